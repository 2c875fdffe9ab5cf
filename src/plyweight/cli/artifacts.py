"""inspect, verify, export, split, join, sign: what is done with an artifact, without torch."""

import os
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plyweight.cli.calling import (
    AllowHttp,
    Artifact,
    ArtifactId,
    AsJson,
    Authorities,
    Patience,
    PublicKey,
    print_json,
    refuse_together,
    token,
)
from plyweight.cli.show import receipt_table, size
from plyweight.errors import TrustError, listed

if TYPE_CHECKING:
    from plyweight.artifact import Header

__all__ = ["export", "inspect", "join", "sign", "split", "verify"]

BitWidth = Annotated[
    int | None,
    typer.Option("--bit-width", "-b", min=1, max=8, metavar="N", help="By default the widest."),
]


class Format(StrEnum):
    """What ``export`` writes."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    ONNX_INT4 = "onnx-int4"
    OPENVINO = "openvino"


class Dtype(StrEnum):
    """Of exported weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


def inspect(
    artifact: Annotated[
        str, typer.Argument(metavar="FILE", help="An artifact, whole or a prefix; or its URL.")
    ],
    artifact_id: ArtifactId = None,
    allow_http: AllowHttp = False,
    patience: Patience = 20,
    as_json: AsJson = False,
) -> None:
    """Show what every bit-width costs; reads the header only."""
    from plyweight.inspecting import inspect as inspect_artifact

    receipt = inspect_artifact(
        artifact,
        artifact_id=artifact_id,
        token=token(),
        allow_http=allow_http,
        patience_s=patience,
    )
    if as_json:
        print_json(receipt.to_json())
        return
    typer.echo(receipt_table(receipt))


def verify(
    artifact: Artifact,
    public_key: PublicKey = None,
    authorities: Authorities = None,
    as_json: AsJson = False,
) -> None:
    """Check every layer against its digest, and who signed it."""
    refuse_together(public_key=public_key, authority=authorities)
    from plyweight.artifact import ArtifactReader

    reader = ArtifactReader(artifact)
    is_signed = public_key is not None or bool(authorities)
    if is_signed:
        _verify_signature(reader.header, artifact, public_key, authorities or ())
    checked, total = len(reader.verify()), len(reader.header.layers)
    if as_json:
        print_json(
            {
                "verified": list(reader.held_bit_widths),
                "stored": list(reader.header.bit_widths),
                "artifact_id": reader.header.artifact_id,
                "public_key": None if public_key is None else str(public_key),
                "authorities": [str(path) for path in authorities or ()],
            }
        )
        return
    rest = "" if checked == total else f"; the other {total - checked} are not in this file"
    typer.echo(f"{checked} of {total} layers match their digests{rest}")
    if is_signed:
        signer = f"someone {listed(authorities)} vouches for" if authorities else public_key
        typer.echo(f"signed by {signer}")


def export(
    artifact: Artifact,
    path: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    bit_width: BitWidth = None,
    to: Annotated[Format, typer.Option(help="The format.")] = Format.SAFETENSORS,
    dtype: Annotated[Dtype, typer.Option(help="Of the layered weights.")] = Dtype.FLOAT32,
    as_json: AsJson = False,
) -> None:
    """Write one bit-width as a file that other tools read."""
    from plyweight.exporting import export as export_file

    report = export_file(artifact, path, bit_width=bit_width, to=to.value, dtype=dtype.value)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "format": report.format,
                "bit_width": report.bit_width,
                "num_bytes": report.num_bytes,
                "difference": report.difference,
                "evaluation": dict(report.evaluation),
            }
        )
        return
    as_what = dtype.value if report.difference is None else report.format
    notes = [f"{report.path}  {size(report.num_bytes)}  {report.bit_width} bits as {as_what}"]
    notes += [f"{metric} {text}" for metric, text in report.evaluation.items()]
    if report.difference is not None:
        shown = f"{report.difference:.1e} of the spread" if report.difference else "none"
        notes.append(f"difference to the engine: {shown}")
    typer.echo("  ".join(notes))


def split(
    artifact: Artifact,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="To make, or an empty one.")],
    as_json: AsJson = False,
) -> None:
    """Write each layer to a file, for servers without byte ranges."""
    from plyweight.artifact import split as split_file

    sidecar = split_file(artifact, folder)
    files = sorted(path.name for path in folder.iterdir())
    if as_json:
        print_json(
            {"folder": str(folder), "artifact_id": sidecar.artifact_id, "files": files},
        )
        return
    typer.echo(f"{folder}  {', '.join(files)}")


def join(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a split artifact.")],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The artifact to write.")],
    bit_width: BitWidth = None,
    artifact_id: ArtifactId = None,
    as_json: AsJson = False,
) -> None:
    """Put a split artifact together again; every byte is verified."""
    from plyweight.artifact import inspect as inspect_file
    from plyweight.artifact import join as join_files

    join_files(folder, path, bit_width=bit_width, artifact_id=artifact_id)
    receipt = inspect_file(path)
    if as_json:
        print_json(receipt.to_json())
        return
    total = size(receipt.layers[len(receipt.held) - 1].total_bytes)
    typer.echo(f"{path}  {total}  {', '.join(map(str, receipt.held))} bits")


def sign(
    artifact: Artifact,
    key: Annotated[Path, typer.Option(metavar="FILE", help="Private elliptic-curve key (PEM).")],
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate (PEM) of that key.")
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Certificate between that and an authority; repeatable.",
        ),
    ] = None,
    password_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the key's password."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign an artifact: writes FILE.layers.json and its signature."""
    if chain and certificate is None:
        raise typer.BadParameter("--chain leads from a certificate; give --certificate too.")
    password = None
    if password_env is not None and (password := os.environ.get(password_env)) is None:
        raise typer.BadParameter(f"there is no environment variable {password_env}; set it.")
    from plyweight.artifact import ArtifactReader, Sidecar, publish_atomically
    from plyweight.artifact.sidecar import SIDECAR_FILE
    from plyweight.delivery.signing import sign as sign_file
    from plyweight.delivery.signing import signature_path

    header, sidecar = ArtifactReader(artifact).header, _sidecar(artifact)
    is_split = sidecar.name == SIDECAR_FILE
    content = Sidecar.of(header, file=None if is_split else Path(artifact).name).emit()
    # Both are made before either is published, so that a wrong key leaves nothing behind.
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, sidecar.name)
        made.write_bytes(content)
        signature = sign_file(
            made,
            private_key=key,
            password=password,
            certificate=certificate,
            certificate_chain=chain or (),
        ).read_bytes()
    signed = signature_path(sidecar)
    # Both are on the disk before either has its name, and the old signature is gone before there is
    # a new sidecar: whoever looks meanwhile, or after a kill, finds none, and never a wrong one.
    with publish_atomically(signed) as file, publish_atomically(sidecar) as sidecar_file:
        sidecar_file.write(content)
        file.write(signature)
        signed.resolve().unlink(missing_ok=True)  # a link stays
    if as_json:
        print_json(
            {
                "artifact_id": header.artifact_id,
                "sidecar": str(sidecar),
                "signature": str(signed),
            }
        )
        return
    typer.echo(f"{signed}  signs artifact sha256:{header.artifact_id}")


# --- beside an artifact -------------------------------------------------------------------------


def _sidecar(artifact: str) -> Path:
    """Where the sidecar of that artifact is."""
    from plyweight.artifact import split_folder
    from plyweight.artifact.sidecar import SIDECAR_FILE

    folder = split_folder(artifact)
    return folder / SIDECAR_FILE if folder is not None else Path(f"{artifact}.{SIDECAR_FILE}")


def _verify_signature(
    header: "Header", artifact: str, public_key: Path | None, authorities: Sequence[Path]
) -> None:
    """Check that the sidecar beside an artifact is signed, and speaks of it."""
    from plyweight.delivery.signing import verify_signature

    sidecar = _sidecar(artifact)
    signed_id = verify_signature(sidecar, public_key=public_key, authorities=authorities)
    if signed_id != header.artifact_id:
        raise TrustError(
            f"{sidecar} is signed, but it is of artifact {signed_id} and {artifact} is "
            f"{header.artifact_id}; fetch both again from the same place."
        )
