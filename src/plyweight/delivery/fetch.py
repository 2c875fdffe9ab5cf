"""fetch: as much of an artifact as a device can afford, verified, in its cache or at a path.

    fetch("https://host/net.layered.safetensors", bit_width=4)           into the cache
    fetch("s3://bucket/net.layered.safetensors", max_bytes=3_000_000)    the widest that fits
    fetch(url, "net.layered.safetensors", deadline_s=5)                  a plain file at a path

Whom to believe: an artifact's id (``artifact_id``), which fixes every byte; or a signature of its
sidecar by a key or authority (``public_key``, ``authorities``); with neither, whatever the name
stands for at its first use, which is warned about once and remembered.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from plyweight.artifact import ByteRange, Header, Source
from plyweight.artifact.opening import is_url
from plyweight.delivery.budget import Budget, Choice
from plyweight.delivery.cache import Cache
from plyweight.delivery.client import (
    MAX_WASTE_BYTES,
    PATIENCE_S,
    FoundHeader,
    download,
    read_header,
    require_newer,
)
from plyweight.delivery.filling import Destination
from plyweight.delivery.gauge import MOST_BYTES, Gauge
from plyweight.delivery.refs import Ref
from plyweight.delivery.source import LocalSource, RemoteSource, open_remote
from plyweight.delivery.standing import StandingFile
from plyweight.delivery.transfer import Progress, Transfer
from plyweight.delivery.trusting import agreed, signed_id, warn_of_first_use
from plyweight.errors import SourceError, listed

__all__ = ["FetchOptions", "Fetched", "evict", "fetch", "fetch_header", "is_remote"]

Address = str | os.PathLike[str] | Source | RemoteSource
PathLike = str | os.PathLike[str]


class FetchOptions(TypedDict, total=False):
    """The keywords of :func:`fetch` beside the bit-width, for functions that hand them on."""

    max_bytes: int | None
    max_ram: int | None
    deadline_s: float | None
    artifact_id: str | None
    public_key: PathLike | None
    authorities: Sequence[PathLike]
    sidecar: PathLike | None
    cache: Cache | PathLike | None
    token: str | None
    allow_http: bool
    allow_rollback: bool
    refresh: bool
    verify: bool
    parallel: int
    max_waste_bytes: int
    patience_s: float
    progress: Callable[[Progress], None] | None


@dataclass(frozen=True)
class Fetched:
    """What is here now.

    Attributes:
        header: of the artifact.
        bit_width: that was chosen.
        reason: why, in a sentence for people.
        artifact: to read it from, as ``load`` does; it may hold more bits than were chosen.
        path: of the file; None in the cache.
        transfer: what was moved.
    """

    header: Header
    bit_width: int
    reason: str
    artifact: Source
    path: Path | None
    transfer: Transfer


def fetch(
    address: Address,
    to: PathLike | None = None,
    *,
    bit_width: int | None = None,
    max_bytes: int | None = None,
    max_ram: int | None = None,
    deadline_s: float | None = None,
    artifact_id: str | None = None,
    public_key: PathLike | None = None,
    authorities: Sequence[PathLike] = (),
    sidecar: PathLike | None = None,
    cache: Cache | PathLike | None = None,
    token: str | None = None,
    allow_http: bool = False,
    allow_rollback: bool = False,
    refresh: bool = False,
    verify: bool = False,
    parallel: int = 4,
    max_waste_bytes: int = MAX_WASTE_BYTES,
    patience_s: float = PATIENCE_S,
    progress: Callable[[Progress], None] | None = None,
) -> Fetched:
    """Bring the layers that are missing, and nothing that is here.

    What comes is verified before it is kept, and what is kept by whoever reads it, as ``load``
    does; ``verify`` does it now, for a disk that may not have kept it. Whatever ends it (Ctrl-C, a
    kill, a failure), what was verified stays, and the next call goes on from there.

    Args:
        address: a URL (https, http, s3, gs, az, hf), a path, or a source.
        to: the path of a plain artifact file to write, or to extend; None for the cache. What the
            cache holds is copied and not fetched.
        bit_width: exactly this one; or limits, from which the widest is chosen that fits; with
            neither, the widest there is.
        max_bytes: of the header and layers up to that bit-width.
        max_ram: bytes that the loaded model may take, activations not counted.
        deadline_s: seconds from now until the last byte is here, at the rate that the link has
            when it is measured, on up to the first MiB.
        artifact_id: 64 hexadecimal digits that the artifact must have.
        public_key: path of the key (PEM) that must have signed its sidecar; or
        authorities: paths of certificates (PEM), one of which must vouch for who signed it.
        sidecar: address of the signed ``layers.json``; by default the artifact's own with
            ``.layers.json`` after its path, or that of the ``layers.json`` of a split one. Its
            signature has ``.sig`` after that.
        cache: a folder or ``Cache``; None for the one of this user.
        token: for the host of ``address`` and no other; a Hub address uses that of this user.
        allow_http: allow plain http to other machines, to which a token goes in clear.
        allow_rollback: accept a revision older than this address has had.
        refresh: ask whether the address has something newer than what it stands for here.
        verify: read again what is here already, and fetch anew what is damaged.
        parallel: requests at the same time.
        max_waste_bytes: that may be read and dropped where a server ignores byte ranges.
        patience_s: give up when nothing arrives for so long.
        progress: is called about ten times a second.

    Raises:
        BitWidthError: If that bit-width is not stored.
        BudgetError: If not even the base layer fits.
        TrustError: If the artifact is not the one that is trusted.
        ArtifactError: If it is damaged at its source.
        DeliveryError: If it does not arrive.
        OutputError: If it cannot be written.
        LayeringError: If the arguments contradict each other.
        ImportError: If an extra is needed that is not installed.
    """
    started = time.monotonic()
    budget = Budget(bit_width, max_bytes, max_ram, deadline_s)
    kept_in = cache if isinstance(cache, Cache) else Cache(cache)
    into: Destination = kept_in if to is None else StandingFile(to, cache=kept_in)
    with _opened(address, token=token, allow_http=allow_http) as source:
        signed = signed_id(
            address,
            source,
            sidecar=sidecar,
            public_key=public_key,
            authorities=authorities,
            token=token,
            allow_http=allow_http,
            patience_s=patience_s,
        )
        pin = agreed(artifact_id, signed)
        gauge = Gauge(source, most_s=_share(deadline_s), patience_s=patience_s)
        choices: list[Choice] = []

        def choose(header: Header) -> int:
            left = None if deadline_s is None else deadline_s - (time.monotonic() - started)
            held = _held_bytes(into, header)
            start = max(held, header.data_start)
            missing = ByteRange(start, min(start + MOST_BYTES, header.file_bytes))
            choices.append(
                budget.choose(
                    header, held_bytes=held, left_s=left, rate=lambda: gauge.rate(missing)
                )
            )
            return choices[-1].bit_width

        def trust(header: Header, known: Ref | None) -> None:
            # A signature says who published it, not that it is the latest; an id says it all.
            if artifact_id is None and known is not None and not allow_rollback:
                require_newer(header, known)
            if pin is None and known is None and not isinstance(source, LocalSource):
                warn_of_first_use(source.name, header.artifact_id)

        measured: RemoteSource = gauge if deadline_s is not None else source
        done = download(
            measured,
            choose=choose,
            into=into,
            artifact_id=pin,
            is_signed=signed is not None,
            trust=trust,
            # Files at a path are trusted by the same notes as those in the cache.
            refs=None if isinstance(source, LocalSource) else kept_in.refs,
            refresh=refresh,
            verify=verify,
            allow_rollback=allow_rollback,
            parallel=parallel,
            max_waste_bytes=max_waste_bytes,
            patience_s=patience_s,
            progress=progress,
        )
    return Fetched(
        done.header,
        done.bit_width,
        choices[-1].reason,
        done.artifact,
        into.path if isinstance(into, StandingFile) else None,
        gauge.accounted(done.transfer),
    )


def fetch_header(
    address: Address,
    *,
    artifact_id: str | None = None,
    token: str | None = None,
    allow_http: bool = False,
    patience_s: float = PATIENCE_S,
) -> FoundHeader:
    """The header at that address and nothing else.

    Raises:
        ArtifactError: If it is wrong.
        TrustError: If it is not that of ``artifact_id``.
        DeliveryError: If it does not arrive.
    """
    with _opened(address, token=token, allow_http=allow_http) as source:
        return read_header(source, artifact_id=artifact_id, patience_s=patience_s)


def evict(
    address: str,
    *,
    keep_bit_width: int | None = None,
    cache: Cache | PathLike | None = None,
) -> int:
    """Delete from the cache what it holds of an artifact; bytes that were freed.

    Models that were loaded keep what they hold. What the address was trusted for is remembered, so
    that evicting it once more frees 0 bytes and is no error.

    Args:
        address: a URL it was fetched from, or the artifact's id.
        keep_bit_width: keep the layers up to that one.
        cache: a folder or ``Cache``; None for the one of this user.

    Raises:
        SourceError: If the cache knows nothing under that address or id.
        BitWidthError: If the artifact has no such bit-width.
    """
    kept_in = cache if isinstance(cache, Cache) else Cache(cache)
    artifact_id = address
    if is_remote(address):
        with _opened(address, token=None, allow_http=True) as source:
            ref = kept_in.refs.get(source.name)
        if ref is None:
            raise SourceError(
                f"{address} was never fetched into {kept_in.folder}; give the address it was "
                "fetched from, or the artifact's id."
            )
        artifact_id = ref.artifact_id
    elif kept_in.raw_header(address) is None and not kept_in.refs.knows(address):
        held = [f"{entry.model} ({entry.artifact_id[:12]})" for entry in kept_in.artifacts()]
        raise SourceError(
            f"artifact {address} was asked for, but {kept_in.folder} holds {listed(held)}; give "
            "the id of what it holds (`plyweight cached` shows it), or the address it was fetched "
            "from."
        )
    return kept_in.evict(artifact_id, keep_bit_width=keep_bit_width)


def is_remote(address: object) -> bool:
    """Whether that is an address to fetch from, not a path or a source to read."""
    return is_url(address) or (
        isinstance(address, RemoteSource) and not isinstance(address, Source)
    )


@contextmanager
def _opened(address: Address, *, token: str | None, allow_http: bool) -> Iterator[RemoteSource]:
    """The source of that address, closed in the end if it is ours."""
    source = open_remote(address, token=token, allow_http=allow_http)
    try:
        yield source
    finally:
        if source is not address:
            source.close()


def _share(deadline_s: float | None) -> float:
    """How long to measure: a quarter of the time there is."""
    return deadline_s / 4 if deadline_s is not None else 0.0


def _held_bytes(into: Destination, header: Header) -> int:
    """Of the prefix, that are at their destination already."""
    for bit_width in reversed(header.bit_widths):
        held = into.opened(header, bit_width)
        if held is not None:
            return header.prefix_bytes(bit_width)
    return 0
