"""Signers: keys, and artifacts that are published with a signed sidecar.

What needs the extra ``[sign]`` is imported where it is used.
"""

from plyweight.artifact import Header, Sidecar
from plyweight.delivery.signing import sign


def pem_of(key, password=None):
    from cryptography.hazmat.primitives import serialization

    encryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def public_pem_of(key):
    from cryptography.hazmat.primitives import serialization

    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def keys(folder, name="key"):
    """A new private key and its public half, as files of PEM."""
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(pem_of(key))
    public.write_bytes(public_pem_of(key))
    return private, public


def id_of(data):
    return Header.parse(data).artifact_id


def signed(folder, data, private):
    """Publish ``data`` in a folder, with its signed sidecar."""
    name = "net.layered.safetensors"
    (folder / name).write_bytes(data)
    sidecar = folder / f"{name}.layers.json"
    sidecar.write_bytes(Sidecar.of(Header.parse(data), file=name).emit())
    sign(sidecar, private_key=private)
    return name
