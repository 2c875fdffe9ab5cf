"""Reading: the one place where what runs a model gets at its artifact, near or far."""

import os

from plyweight.artifact import ArtifactReader, Source, TensorView
from plyweight.artifact.opening import require_id
from plyweight.delivery.budget import Budget
from plyweight.delivery.cache import Cache
from plyweight.delivery.fetch import FetchOptions, fetch, is_remote
from plyweight.errors import DigestError, LayeringError, listed

__all__ = ["Address", "opened_at", "without_limits"]

Address = str | os.PathLike[str] | Source
OF_A_FILE = ("max_bytes", "max_ram", "artifact_id")  # options that need no delivery


def opened_at(
    address: Address, bit_width: int | None, options: FetchOptions, *, known: str | None = None
) -> tuple[ArtifactReader, int]:
    """A reader of the artifact, and the bit-width to take: what is missing of a URL is fetched.

    Args:
        address: a URL, a path or a source.
        bit_width: None for the widest that fits ``options``.
        options: of :func:`plyweight.fetch`.
        known: the id of the artifact that a model was loaded from.

    Raises:
        BitWidthError: If that bit-width is not there.
        ArtifactError: If the artifact is damaged.
        TrustError: If it is not the one that is trusted.
        DeliveryError: If it cannot be read or does not arrive.
        LayeringError: If an option does not apply.
    """
    if is_remote(address):
        assert isinstance(address, str)
        if known is not None and not options.get("artifact_id"):
            # What a model was loaded from is what it is upgraded from, whatever is there by now.
            options = {**options, "artifact_id": known}
        fetched = _FetchedReader(address, bit_width, options)
        return fetched, fetched.bit_width
    others = sorted(set(options) - set(OF_A_FILE))
    if others:
        raise LayeringError(
            f"{listed(others)} was given, but {address!r:.100} is no URL; a file takes "
            f"{listed(OF_A_FILE)}."
        )
    reader = ArtifactReader(address)
    require_id(reader.source.name, reader.header.artifact_id, options.get("artifact_id"))
    limits = {name: options.get(name) for name in ("max_bytes", "max_ram")}
    if not any(value is not None for value in limits.values()):
        return reader, reader.held_bit_widths[-1] if bit_width is None else bit_width
    budget = Budget(bit_width, options.get("max_bytes"), options.get("max_ram"))
    return reader, min(budget.choose(reader.header).bit_width, reader.held_bit_widths[-1])


class _FetchedReader(ArtifactReader):
    """Reads a fetched artifact; what the disk has lost since it was verified is fetched again."""

    def __init__(self, address: str, bit_width: int | None, options: FetchOptions) -> None:
        fetched = fetch(address, bit_width=bit_width, **options)
        super().__init__(fetched.artifact)
        self.bit_width = fetched.bit_width
        self._address, self._options = address, without_limits(options)
        self._options["artifact_id"] = fetched.header.artifact_id

    def read_layer(self, index: int) -> dict[str, TensorView]:
        """As of any reader."""
        try:
            return super().read_layer(index)
        except DigestError:
            cache = self._options.get("cache")
            kept_in = cache if isinstance(cache, Cache) else Cache(cache)
            if not kept_in.repair(self.header.artifact_id):
                raise
            fetched = fetch(self._address, bit_width=self.bit_width, **self._options)
            self.source = fetched.artifact
            return super().read_layer(index)


def without_limits(options: FetchOptions) -> FetchOptions:
    """The bit-width is chosen; only how to fetch it is left."""
    kept = options.copy()
    for name in ("max_bytes", "max_ram", "deadline_s"):
        kept.pop(name, None)  # type: ignore[misc]
    return kept
