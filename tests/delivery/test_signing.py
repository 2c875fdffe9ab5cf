"""Signing: a signature is of one sidecar by one key, and of nothing else."""

import base64
import datetime
import hashlib
import json
import subprocess
import sys

import pytest
from artifact.builders import MODEL, build, layer_contents
from delivery import signers
from delivery.signers import pem_of, public_pem_of

from plyweight.artifact import Header, ModelInfo, Sidecar, join, split
from plyweight.delivery.signing import sign, signature_path, verify_signature
from plyweight.errors import HeaderError, OutputError, SourceError, TrustError

pytest.importorskip("model_signing")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID


def certificate_of(key, name, *, issuer=None, issuer_key=None, is_authority=False, days=(-1, 30)):
    """A certificate of ``key`` by ``issuer``, or by itself."""
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_authority,
                key_cert_sign=is_authority,
                crl_sign=is_authority,
                **usage,
            ),
            critical=True,
        )
        .sign(issuer_key or key, hashes.SHA256())
    )


class Issued:
    """A key, its certificate by way of one in between, and the authority."""

    def __init__(self, folder, *, days=(-1, 30)):
        folder.mkdir()
        root_key, middle_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        root = certificate_of(root_key, "root", is_authority=True, days=days)
        middle = certificate_of(
            middle_key, "middle", issuer=root, issuer_key=root_key, is_authority=True, days=days
        )
        own = certificate_of(key, "signer", issuer=middle, issuer_key=middle_key, days=days)
        self.key, self.certificate = folder / "key.pem", folder / "signer.pem"
        self.middle, self.authority = folder / "middle.pem", folder / "root.pem"
        self.key.write_bytes(pem_of(key))
        for path, certificate in [
            (self.certificate, own),
            (self.middle, middle),
            (self.authority, root),
        ]:
            path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def sign(self, sidecar, **options):
        return sign(
            sidecar,
            private_key=self.key,
            certificate=self.certificate,
            certificate_chain=[self.middle],
            **options,
        )


class Keys:
    """A signer's keys and somebody else's."""

    def __init__(self, folder):
        self.private, self.public = signers.keys(folder)
        self.other, self.other_public = signers.keys(folder, "other")


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path)


@pytest.fixture
def sidecar(tmp_path):
    """``layers.json`` of a split artifact."""
    build(tmp_path / "whole")
    split(tmp_path / "whole", tmp_path / "parts")
    return tmp_path / "parts" / "layers.json"


def id_of(sidecar):
    return Sidecar.parse(sidecar.read_bytes()).artifact_id


# --- with a key --------------------------------------------------------------------------------


def test_a_signature_by_a_key_verifies_and_gives_the_artifact_id(sidecar, keys, tmp_path):
    written = sign(sidecar, private_key=keys.private)
    assert written == signature_path(sidecar) == sidecar.with_name("layers.json.sig")
    artifact_id = verify_signature(sidecar, public_key=keys.public)
    assert artifact_id == Header.parse((tmp_path / "whole").read_bytes()).artifact_id
    join(sidecar.parent, tmp_path / "again", artifact_id=artifact_id)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_the_larger_curves_sign_as_well(sidecar, tmp_path, curve):
    key = ec.generate_private_key(curve)
    (tmp_path / "k").write_bytes(pem_of(key))
    (tmp_path / "p").write_bytes(public_pem_of(key))
    sign(sidecar, private_key=tmp_path / "k", signature=tmp_path / "sig")
    verify_signature(sidecar, public_key=tmp_path / "p", signature=tmp_path / "sig")


def test_a_key_may_have_a_password(sidecar, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "k").write_bytes(pem_of(key, b"a password"))
    (tmp_path / "p").write_bytes(public_pem_of(key))
    sign(sidecar, private_key=tmp_path / "k", password="a password")
    assert verify_signature(sidecar, public_key=tmp_path / "p") == id_of(sidecar)
    for wrong in (None, "another"):
        with pytest.raises(TrustError, match="its password if it has one"):
            sign(sidecar, private_key=tmp_path / "k", password=wrong)


def test_a_signature_by_another_key_is_refused_and_both_are_named(sidecar, keys):
    sign(sidecar, private_key=keys.other)
    with pytest.raises(TrustError) as caught:
        verify_signature(sidecar, public_key=keys.public)
    message = str(caught.value)
    assert f"{sidecar}.sig is no signature of {sidecar} by {keys.public} (" in message
    assert "do not use the artifact" in message


def test_a_consistent_forgery_is_refused_with_the_signature_of_the_true_one(
    sidecar, keys, tmp_path
):
    """Threat 13: whoever owns the server replaces header, layers and sidecar, all digests right."""
    sign(sidecar, private_key=keys.private)
    build(tmp_path / "forged", layers=layer_contents(seed=7))
    split(tmp_path / "forged", tmp_path / "forgery")
    forged = tmp_path / "forgery" / "layers.json"
    forged.with_name("layers.json.sig").write_bytes(signature_path(sidecar).read_bytes())
    with pytest.raises(TrustError, match="do not use the artifact"):
        verify_signature(forged, public_key=keys.public)


def test_the_signature_of_an_older_revision_does_not_cover_a_newer_one(sidecar, keys, tmp_path):
    sign(sidecar, private_key=keys.private)
    newer = ModelInfo(**vars(MODEL) | {"revision": MODEL.revision + 1})
    build(tmp_path / "newer", model=newer)
    split(tmp_path / "newer", tmp_path / "newer parts")
    with pytest.raises(TrustError):
        verify_signature(
            tmp_path / "newer parts" / "layers.json",
            public_key=keys.public,
            signature=signature_path(sidecar),
        )


def test_a_flipped_bit_of_the_sidecar_or_of_the_signature_is_refused(sidecar, keys):
    written = sign(sidecar, private_key=keys.private)
    statement = json.loads(written.read_bytes())
    signed = base64.b64decode(statement["dsseEnvelope"]["signatures"][0]["sig"])
    for path, position in [(sidecar, 20), (sidecar, -2)]:
        raw = path.read_bytes()
        changed = bytearray(raw)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(TrustError):
            verify_signature(sidecar, public_key=keys.public)
        path.write_bytes(raw)
    changed = bytearray(signed)
    changed[-1] ^= 1
    statement["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(changed).decode()
    written.write_text(json.dumps(statement))
    with pytest.raises(TrustError):
        verify_signature(sidecar, public_key=keys.public)


BROKEN = {
    "nothing": b"",
    "no JSON": b"signature",
    "null": b"null",
    "an object": b"{}",
    "no UTF-8": b"\xff",
    "deep": b"[" * 100_000,
    "too large": b" " * (2**20 + 1),
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_signature_is_refused(sidecar, keys, raw):
    signature_path(sidecar).write_bytes(raw)
    with pytest.raises(TrustError):
        verify_signature(sidecar, public_key=keys.public)


def signed_statement(key, predicate, subject_digest):
    """A signature file over any statement, as its signer could make one."""
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "layers.json", "digest": {"sha256": subject_digest}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": predicate,
    }
    kind, payload = "application/vnd.in-toto+json", json.dumps(statement).encode()
    message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
    hint = hashlib.sha256(public_pem_of(key)).hexdigest()
    return json.dumps(
        {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": kind,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


@pytest.mark.parametrize("ignored", [[], ["layers.json"], ["."]])
def test_a_true_signature_that_leaves_the_sidecar_out_is_refused(sidecar, keys, ignored):
    """The statement says what is hashed; one that says "nothing" must not cover everything."""
    key = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    form = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    predicate = {"serialization": form | {"ignore_paths": ignored}, "resources": []}
    nothing = hashlib.sha256().hexdigest()
    signature_path(sidecar).write_text(signed_statement(key, predicate, nothing))
    with pytest.raises(TrustError):
        verify_signature(sidecar, public_key=keys.public)


def test_the_command_of_model_signing_and_this_verify_each_other(sidecar, keys, tmp_path):
    def command(*arguments):
        subprocess.run(
            [sys.executable, "-m", "model_signing", *map(str, arguments)],
            check=True,
            capture_output=True,
        )

    theirs = tmp_path / "theirs.sig"
    command("sign", "key", sidecar, "--private_key", keys.private, "--signature", theirs)
    assert verify_signature(sidecar, public_key=keys.public, signature=theirs) == id_of(sidecar)
    ours = sign(sidecar, private_key=keys.private)
    command("verify", "key", sidecar, "--public_key", keys.public, "--signature", ours)


# --- with a certificate ------------------------------------------------------------------------


def test_a_signature_with_a_certificate_verifies_by_its_authority(sidecar, tmp_path):
    issued = Issued(tmp_path / "issued")
    issued.sign(sidecar)
    assert verify_signature(sidecar, authorities=[issued.authority]) == id_of(sidecar)


def test_a_certificate_of_another_authority_is_refused_and_named(sidecar, tmp_path):
    issued, others = Issued(tmp_path / "issued"), Issued(tmp_path / "others")
    others.sign(sidecar)
    with pytest.raises(TrustError, match=r"by .*issued/root\.pem"):
        verify_signature(sidecar, authorities=[issued.authority])


def test_a_certificate_without_the_one_that_vouches_for_it_is_refused(sidecar, tmp_path):
    issued = Issued(tmp_path / "issued")
    sign(sidecar, private_key=issued.key, certificate=issued.certificate)
    with pytest.raises(TrustError):
        verify_signature(sidecar, authorities=[issued.authority])
    chain = [issued.authority, issued.middle]
    assert verify_signature(sidecar, authorities=chain) == id_of(sidecar)


def test_a_certificate_that_ran_out_after_signing_still_verifies(sidecar, tmp_path):
    issued = Issued(tmp_path / "issued", days=(-30, -1))
    issued.sign(sidecar)
    assert verify_signature(sidecar, authorities=[issued.authority]) == id_of(sidecar)


def test_a_certificate_of_another_key_does_not_sign(sidecar, keys, tmp_path):
    issued = Issued(tmp_path / "issued")
    with pytest.raises(TrustError, match="a certificate of that very key"):
        sign(sidecar, private_key=keys.private, certificate=issued.certificate)
    assert not signature_path(sidecar).exists()


# --- what is asked for wrongly -----------------------------------------------------------------


def test_one_of_key_and_authorities_is_given(sidecar, keys):
    sign(sidecar, private_key=keys.private)
    for options in ({}, {"public_key": keys.public, "authorities": [keys.public]}):
        with pytest.raises(TrustError, match="give one of them"):
            verify_signature(sidecar, **options)


def test_a_missing_file_is_named(sidecar, keys, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(SourceError, match=r"layers\.json\.sig does not exist"):
        verify_signature(sidecar, public_key=keys.public)
    sign(sidecar, private_key=keys.private)
    for call in (
        lambda: sign(missing, private_key=keys.private),
        lambda: sign(sidecar, private_key=missing),
        lambda: verify_signature(missing, public_key=keys.public),
        lambda: verify_signature(sidecar, public_key=missing),
        lambda: verify_signature(sidecar, authorities=[missing]),
    ):
        with pytest.raises(SourceError, match="missing"):
            call()


def test_what_is_no_sidecar_is_not_signed(sidecar, keys):
    sidecar.write_text("{}")
    with pytest.raises(HeaderError, match=r"layers\.json lacks"):
        sign(sidecar, private_key=keys.private)
    assert not signature_path(sidecar).exists()


def test_a_signed_file_that_is_no_sidecar_is_refused(sidecar, keys):
    key = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    sidecar.write_text("{}")
    digest = hashlib.sha256(b"{}").digest()
    form = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    resource = {"name": ".", "algorithm": "sha256", "digest": digest.hex()}
    predicate = {"serialization": form, "resources": [resource]}
    root = hashlib.sha256(digest).hexdigest()
    signature_path(sidecar).write_text(signed_statement(key, predicate, root))
    with pytest.raises(HeaderError, match=r"layers\.json lacks"):
        verify_signature(sidecar, public_key=keys.public)


def test_a_key_that_cannot_sign_is_refused_in_words(sidecar, tmp_path):
    (tmp_path / "rsa").write_bytes(pem_of(rsa.generate_private_key(65537, 2048)))
    (tmp_path / "text").write_text("no key")
    for name in ("rsa", "text"):
        with pytest.raises(TrustError, match=f"cannot be signed with .*{name}"):
            sign(sidecar, private_key=tmp_path / name)


def test_a_signature_that_cannot_be_written_leaves_nothing(sidecar, keys, tmp_path):
    with pytest.raises(OutputError):
        sign(sidecar, private_key=keys.private, signature=tmp_path / "no folder" / "sig")
    assert not signature_path(sidecar).exists()


def test_without_model_signing_one_sentence_names_the_extra(sidecar, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (
        lambda: sign(sidecar, private_key=keys.private),
        lambda: verify_signature(sidecar, public_key=keys.public),
    ):
        with pytest.raises(ImportError, match=r'pip install "plyweight\[sign\]"'):
            call()
