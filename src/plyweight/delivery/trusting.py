"""Trusting: which artifact an address is to have, by an id or by a signature.

    artifact                  its sidecar                           the signature of that
    net.safetensors           net.safetensors.layers.json           net.safetensors.layers.json.sig
    net/layers.json           net/layers.json                       net/layers.json.sig
    https://host/net?key=x    https://host/net.layers.json?key=x    .../net.layers.json.sig?key=x

The sidecar names the artifact's id and is small enough to be fetched first; who has signed it is
asked before one byte of the artifact is.
"""

import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from plyweight.artifact import Source
from plyweight.artifact.opening import is_url
from plyweight.artifact.sidecar import MAX_SIDECAR_BYTES
from plyweight.delivery.parts import PartsSource
from plyweight.delivery.retry import Patience
from plyweight.delivery.signing import MAX_SIGNATURE_BYTES, verify_signature
from plyweight.delivery.source import RemoteSource, open_file, read_small
from plyweight.errors import LayeringError, TransferError, TrustError, TrustWarning

__all__ = ["agreed", "signed_id", "warn_of_first_use"]

PathLike = str | os.PathLike[str]


def agreed(artifact_id: str | None, signed: str | None) -> str | None:
    """The one id that was given or signed, if there is one.

    Raises:
        TrustError: If there are two.
    """
    if artifact_id is not None and signed is not None and artifact_id != signed:
        raise TrustError(
            f"artifact_id is {artifact_id}, but the signature is of {signed}; ask the publisher "
            "which of them is meant."
        )
    return artifact_id or signed


def signed_id(
    address: PathLike | Source | RemoteSource,
    source: RemoteSource,
    *,
    sidecar: PathLike | None,
    public_key: PathLike | None,
    authorities: Sequence[PathLike],
    token: str | None,
    allow_http: bool,
    patience_s: float,
) -> str | None:
    """The artifact id that the signature vouches for; None if none is asked for.

    Args:
        address: of the artifact, as it was given.
        source: of the artifact.
        sidecar: address of the signed sidecar; None for where it is beside the artifact.
        public_key: path of the signer's key; or
        authorities: paths of certificates.
        token: for the host of ``address``.
        allow_http: allow plain http to other machines.
        patience_s: give up when nothing arrives for so long.

    Raises:
        LayeringError: If there is a sidecar, but nothing to verify it with.
        TrustError: If it is not signed by whom it should be.
        DeliveryError: If it cannot be read.
    """
    if public_key is None and not authorities:
        if sidecar is not None:
            raise LayeringError(
                "sidecar was given, but nothing to verify it with; give public_key or authorities."
            )
        return None
    where = os.fspath(sidecar) if sidecar is not None else _sidecar_of(address, source)
    # The token is for the host of the artifact; another sidecar may be anywhere.
    own = token if sidecar is None else None
    with tempfile.TemporaryDirectory() as folder:
        local, signature = Path(folder, "layers.json"), Path(folder, "layers.json.sig")
        names = [
            _download(place, path, most, own, allow_http, patience_s)
            for place, path, most in (
                (where, local, MAX_SIDECAR_BYTES),
                (_longer(where, ".sig"), signature, MAX_SIGNATURE_BYTES),
            )
        ]
        try:
            return verify_signature(
                local, public_key=public_key, authorities=authorities, signature=signature
            )
        except TrustError as error:
            raise TrustError(str(error).replace(str(local), names[0])) from error


def warn_of_first_use(name: str, artifact_id: str) -> None:
    """Warn that nothing vouches for an artifact, at the line that called into this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith("plyweight."):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{name} is trusted on first use: nothing says that artifact {artifact_id} is the one its "
        "publisher meant. Pin it with artifact_id=, or verify a signature with public_key=.",
        TrustWarning,
        stacklevel=level,
    )


def _sidecar_of(address: PathLike | Source | RemoteSource, source: RemoteSource) -> str:
    """Where the sidecar is if nothing else is said."""
    # As it was given, with user and query: a name has neither.
    place = address if is_url(address) else source.name
    return place if isinstance(source, PartsSource) else _longer(place, ".layers.json")


def _longer(address: str, ending: str) -> str:
    """The address with that after its path, which is where the query of a web address begins."""
    is_web = address.startswith(("http://", "https://"))  # elsewhere a "?" is part of the path
    path = re.split(r"[?#]", address, maxsplit=1)[0] if is_web else address
    return f"{path}{ending}{address.removeprefix(path)}"


def _download(
    address: str,
    path: Path,
    most_bytes: int,
    token: str | None,
    allow_http: bool,
    patience_s: float,
) -> str:
    """Bring a small file to ``path``; the name of where it was, for messages."""
    patience, failures = Patience(patience_s), 0
    source = open_file(address, token=token, allow_http=allow_http)
    try:
        while True:
            try:
                path.write_bytes(read_small(source, most_bytes))
                return source.name
            except TransferError as error:
                failures += 1
                patience.pause(failures, error)
    finally:
        source.close()
