"""Signing: who made an artifact, by an OpenSSF model signature of its sidecar.

    sign("layers.json", private_key="key.pem")                    writes layers.json.sig
    verify_signature("layers.json", public_key="key.pub")         the artifact's id

The sidecar fixes every byte of the artifact by digests, so its signature is one for all layers and
for each prefix, and it is small enough to be fetched first. What is written is what the command
``model_signing sign key`` (or ``sign certificate``) writes, and either verifies the other's.

With a certificate, whoever holds one that the given authorities vouch for may sign: name an
authority that vouches for nobody else. That a certificate has run out since is no reason to refuse.
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from plyweight.artifact import ByteRange, FileSource, Sidecar, publish_atomically
from plyweight.errors import TrustError

__all__ = ["sign", "signature_path", "verify_signature"]

MAX_SIGNATURE_BYTES = 2**20
PathLike = str | os.PathLike[str]


def signature_path(sidecar: PathLike) -> Path:
    """Where a signature is if nothing else is said: beside what it signs."""
    path = Path(sidecar)
    return path.with_name(f"{path.name}.sig")


def sign(
    sidecar: PathLike,
    *,
    private_key: PathLike,
    password: str | None = None,
    certificate: PathLike | None = None,
    certificate_chain: Sequence[PathLike] = (),
    signature: PathLike | None = None,
) -> Path:
    """Sign a sidecar with a key, or with a key and the certificate of it.

    Args:
        sidecar: path of a ``layers.json``; one that breaks its rules is not signed.
        private_key: path of an elliptic-curve key (P-256, P-384 or P-521) in PEM.
        password: of the key, if it has one.
        certificate: path of a certificate in PEM that has the key; None to sign with the key alone.
        certificate_chain: paths of the certificates between that and an authority.
        signature: path to write to; by default the sidecar's with ``.sig`` after it.

    Returns:
        The path of the signature.

    Raises:
        ImportError: If the extra ``sign`` is not installed.
        SourceError: If a file cannot be read.
        HeaderError: If the sidecar breaks a rule.
        TrustError: If the key or certificate cannot sign, or they do not belong together.
        OutputError: If the signature cannot be written.
    """
    signing = _model_signing("signing")
    raw = _read(sidecar)
    Sidecar.parse(raw)
    for path in (private_key, certificate, *certificate_chain):
        if path is not None:
            _read(path)
    target = signature_path(sidecar) if signature is None else Path(signature)
    with tempfile.TemporaryDirectory() as folder:
        copy, written = Path(folder, Path(sidecar).name), Path(folder, "signature")
        copy.write_bytes(raw)
        try:
            config = signing.Config()
            if certificate is None:
                # The library hands the password on as it is, and cryptography wants bytes.
                secret = None if password is None else password.encode()
                config.use_elliptic_key_signer(private_key=private_key, password=secret)
            else:
                config.use_certificate_signer(
                    private_key=private_key,
                    signing_certificate=certificate,
                    # It takes no empty chain; one certificate more does no harm.
                    certificate_chain=certificate_chain or (certificate,),
                )
            config.sign(copy, written)
        except Exception as error:  # whatever it is: there is no signature
            raise TrustError(
                f"{os.fspath(sidecar)} cannot be signed with {os.fspath(private_key)} "
                f"({_reason(error)}); give an elliptic-curve key in PEM, its password if it has "
                "one, and a certificate of that very key."
            ) from error
        with publish_atomically(target) as file:
            file.write(written.read_bytes())
    return target


def verify_signature(
    sidecar: PathLike,
    *,
    public_key: PathLike | None = None,
    authorities: Sequence[PathLike] = (),
    signature: PathLike | None = None,
) -> str:
    """Check who signed a sidecar; the id of the artifact that it speaks of.

    Args:
        sidecar: path of a ``layers.json``.
        public_key: path of the signer's key in PEM; or
        authorities: paths of certificates in PEM that must vouch for the signer's.
        signature: path of the signature; by default the sidecar's with ``.sig`` after it.

    Returns:
        The artifact id in hexadecimal: what to pin when the artifact is fetched.

    Raises:
        ImportError: If the extra ``sign`` is not installed.
        SourceError: If a file cannot be read.
        TrustError: If the signature is not by that key or authority, or not of this sidecar.
        HeaderError: If what was signed breaks a rule.
    """
    verifying = _model_signing("verifying")
    if (public_key is None) == (not authorities):
        raise TrustError(
            "a signature is verified against a public key or against authorities; give one of them."
        )
    target = signature_path(sidecar) if signature is None else Path(signature)
    # Read once: what is parsed below is what was verified, whoever changes the files meanwhile.
    raw, raw_signature = _read(sidecar), _read(target)
    trusted = (public_key,) if public_key is not None else tuple(authorities)
    for path in trusted:
        _read(path)
    with tempfile.TemporaryDirectory() as folder:
        copy, copied = Path(folder, Path(sidecar).name), Path(folder, "signature")
        copy.write_bytes(raw)
        copied.write_bytes(raw_signature)
        try:
            config = verifying.Config()
            if public_key is not None:
                config.use_elliptic_key_verifier(public_key=public_key)
            else:
                config.use_certificate_verifier(certificate_chain=authorities)
            config.verify(copy, copied)
            _require_signed(raw, raw_signature)
        except Exception as error:  # whatever it is: nothing was verified
            raise TrustError(
                f"{target} is no signature of {os.fspath(sidecar)} by "
                f"{', '.join(os.fspath(path) for path in trusted)} ({_reason(error)}); fetch both "
                "again, and do not use the artifact unless they agree."
            ) from error
    return Sidecar.parse(raw).artifact_id


def _require_signed(raw: bytes, raw_signature: bytes) -> None:
    """The statement, whose signature was verified, is about these bytes and nothing else.

    The library compares what it hashes, and what it hashes (which files, which are ignored, with
    which algorithm) the statement may choose. Here is one file and one algorithm.
    """
    statement = json.loads(base64.b64decode(json.loads(raw_signature)["dsseEnvelope"]["payload"]))
    (resource,) = statement["predicate"]["resources"]
    digest = hashlib.sha256(raw).hexdigest()
    if (resource["algorithm"], resource["digest"]) != ("sha256", digest):
        raise ValueError(f"it is of {resource['algorithm']} {resource['digest']}, this is {digest}")


def _read(path: PathLike) -> bytes:
    """The bytes of a small file; of a large one only what shows that it is too large."""
    source = FileSource(path)
    try:
        if source.size() > MAX_SIGNATURE_BYTES:
            raise TrustError(
                f"{source.name} has {source.size()} bytes; no sidecar, signature, key or "
                f"certificate has more than {MAX_SIGNATURE_BYTES}, so check the path."
            )
        return bytes(source.read(ByteRange(0, source.size())))
    finally:
        source.close()


def _reason(error: Exception) -> str:
    """What the library says, or the kind of error where it says nothing."""
    words = " ".join(str(error).split())
    return words[:200] if words else type(error).__name__


def _model_signing(module: str) -> ModuleType:
    """A module of model-signing, which takes a second to import."""
    try:
        import model_signing
    except ImportError as error:
        raise ImportError(
            f"signing needs model-signing, which is not installed ({error}); "
            'install it with: pip install "plyweight[sign]"'
        ) from error
    loaded: ModuleType = getattr(model_signing, module)
    return loaded
