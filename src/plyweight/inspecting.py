"""inspect: what an artifact consists of, wherever it is.

    inspect("net.layered.safetensors")               a file, or the folder of a split artifact
    inspect("https://host/net.layered.safetensors")  of which no more than the header is fetched

What moves bytes is imported when an address asks for it: looking at a file starts sooner without.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from plyweight.artifact import Receipt, Source
from plyweight.artifact import inspect as inspect_local
from plyweight.artifact.opening import is_url, require_id
from plyweight.artifact.reader import naming, num_held
from plyweight.artifact.receipt import receipt_of

if TYPE_CHECKING:
    from plyweight.delivery import RemoteSource, Transfer

__all__ = ["RemoteReceipt", "inspect"]


@dataclass(frozen=True)
class RemoteReceipt(Receipt):
    """The receipt of an artifact at a URL.

    Attributes:
        transfer: what was moved for it.
    """

    transfer: "Transfer"

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        values = super().to_json()
        moved = values.pop("transfer")
        return values | {name: moved[name] for name in ("requests", "received_bytes", "seconds")}


def inspect(
    address: "str | os.PathLike[str] | Source | RemoteSource",
    *,
    artifact_id: str | None = None,
    token: str | None = None,
    allow_http: bool = False,
    patience_s: float = 20.0,
) -> Receipt:
    """What an artifact consists of and what every bit-width costs; only its header is read.

    Args:
        address: a file, whole or a prefix; the folder of a split artifact or its ``layers.json``; a
            URL (https, http, s3, gs, az, hf), whose receipt is a :class:`RemoteReceipt`; or a
            source.
        artifact_id: 64 hexadecimal digits that the artifact must have.
        token: for the host of a URL and no other; a Hub address uses that of this user.
        allow_http: allow plain http to other machines.
        patience_s: give up a URL when nothing arrives for so long.

    Returns:
        The receipt. Layers are held as far as they lie inside the size of the file; at a URL, of
        that which its server states, and where it states none, all are.

    Raises:
        ArtifactError: If the header is wrong, or the file does not end where a layer does.
        TrustError: If it is not that of ``artifact_id``.
        DeliveryError: If it cannot be opened or read, or does not arrive.
        ImportError: If an extra is needed that is not installed.
    """
    if _is_local(address):
        receipt = inspect_local(address)
        require_id(address, receipt.artifact_id, artifact_id)
        return receipt
    from plyweight.delivery import fetch_header

    found = fetch_header(
        address,
        artifact_id=artifact_id,
        token=token,
        allow_http=allow_http,
        patience_s=patience_s,
    )
    header, total = found.header, found.total_bytes
    with naming(found.name):
        held = len(header.layers) if total is None else num_held(header, total)
    receipt = receipt_of(header, header.bit_widths[:held])
    return RemoteReceipt(**vars(receipt), transfer=found.transfer)


def _is_local(address: object) -> "TypeGuard[str | os.PathLike[str] | Source]":
    return isinstance(address, str | os.PathLike | Source) and not is_url(address)
