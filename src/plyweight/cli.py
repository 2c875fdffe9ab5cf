"""What a person types. One function per subcommand; what a subcommand needs is imported in it.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 it failed, 2 it was
called wrongly, 130 interrupted. An error is one sentence; ``--debug`` shows where it came from.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plyweight.errors import OutputError, PlyweightError, SourceError

if TYPE_CHECKING:
    from plyweight.artifact import Receipt
    from plyweight.demo import DemoResult, Progress

__all__ = ["app", "main"]

app = typer.Typer(
    help="One layered file for every bit-width.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts faster, and docs/cli.md holds it as it is
)

INTERRUPTED = 130  # 128 + SIGINT, as shells count

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Artifact = Annotated[
    str, typer.Argument(metavar="FILE", help="An artifact, whole or cut at the end of a layer.")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (``sys.argv[1:]`` if None); the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=arguments, prog_name="plyweight", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # Called wrongly: click's exceptions, of which typer has a private copy.
            error.show()
            return int(error.exit_code)
        if not isinstance(error, (PlyweightError, ImportError, OSError)):
            raise
        if "--debug" in arguments:
            typer.echo(traceback.format_exc(), err=True)
        typer.echo(f"plyweight: {error}", err=True)
        return 1
    if code == INTERRUPTED:  # which typer returns by itself, without a word
        typer.echo("plyweight: interrupted; nothing half-written is left.", err=True)
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        from plyweight import __version__

        typer.echo(f"plyweight {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """One layered file for every bit-width."""


@app.command()
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="Train less; under 40 seconds.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="The same seed makes the same file.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the file and the figure go.")
    ] = Path("plyweight-demo"),
    as_json: AsJson = False,
) -> None:
    """Train, pack and load at 1 to 8 bits on real handwritten digits."""
    with _needed_for("plyweight demo", extra="demo"):
        import matplotlib  # noqa: F401  missed now, not after the training
        import sklearn  # noqa: F401

        from plyweight.demo import FAST, Recipe, draw, run_demo
    _create_folder(out)  # before the training, not after
    with _progress_bars() as progress:
        result = run_demo(out, seed=seed, recipe=FAST if fast else Recipe(), progress=progress)
    figure = out / "digits.png"
    draw(result, figure)
    if as_json:
        typer.echo(json.dumps(result.to_json() | {"figure": str(figure)}))
        return
    typer.echo(_demo_table(result))
    typer.echo(f"\nfile    {result.path}\nfigure  {figure}")


@app.command()
def pack(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="torch.save(model.state_dict(), ...)")
    ],
    artifact: Annotated[Path, typer.Argument(metavar="FILE", help="The artifact to write.")],
    name: Annotated[str | None, typer.Option(help="Of the model, for people.")] = None,
    revision: Annotated[
        int, typer.Option(min=0, max=2**53, help="Counts up with every publication.")
    ] = 0,
    license: Annotated[str | None, typer.Option(help="Such as Apache-2.0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pack the saved state dict of a prepared model into one artifact."""
    with _needed_for("plyweight pack", extra="train"):
        from plyweight.packing import pack as pack_state
    if artifact.resolve() == checkpoint.resolve():
        raise OutputError(f"{artifact} is the checkpoint itself; give the artifact another path.")
    state = _load_checkpoint(checkpoint)
    receipt = pack_state(
        state, artifact, name=name or checkpoint.stem, revision=revision, license=license
    )
    if as_json:
        typer.echo(json.dumps(receipt.to_json()))
        return
    widths = ", ".join(map(str, receipt.held))
    size = _size(receipt.layers[-1].total_bytes)
    typer.echo(f"{artifact}  {size}  {receipt.num_layered} layered weights  {widths} bits")


@app.command()
def inspect(artifact: Artifact, as_json: AsJson = False) -> None:
    """Show what every bit-width costs; reads the header only."""
    from plyweight.artifact import inspect as inspect_file

    receipt = inspect_file(artifact)
    typer.echo(json.dumps(receipt.to_json()) if as_json else _receipt_table(receipt))


@app.command()
def verify(artifact: Artifact, as_json: AsJson = False) -> None:
    """Check every layer against its digest."""
    from plyweight.artifact import ArtifactReader

    reader = ArtifactReader(artifact)
    checked, total = len(reader.verify()), len(reader.header.layers)
    if as_json:
        widths = list(reader.held_bit_widths)
        typer.echo(json.dumps({"verified": widths, "stored": list(reader.header.bit_widths)}))
        return
    rest = "" if checked == total else f"; the other {total - checked} are not in this file"
    typer.echo(f"{checked} of {total} layers match their digests{rest}")


def _receipt_table(receipt: "Receipt") -> str:
    rows = [
        (
            "enhancement" if index else "base",
            str(layer.bit_width),
            _size(layer.plane_bytes),
            _size(layer.side_bytes),
            _size(layer.padding_bytes),
            _size(layer.num_bytes),
            _size(layer.total_bytes),
            f"{layer.bits_per_weight:.2f}",
            f"sha256:{layer.sha256[:12]}" + ("" if layer.held else "  not in this file"),
        )
        for index, layer in enumerate(receipt.layers)
    ]
    head = (
        "layer",
        "bit-width",
        "planes",
        "side info",
        "padding",
        "bytes",
        "total",
        "bits/weight",
        "digest",
    )
    return (
        f"{_table(head, rows, left={0, 8})}\n\n"
        f"header {_size(receipt.header_bytes)} (in every total)  "
        f"{receipt.num_weights:,} weights in {receipt.num_layered} tensors  "
        f"artifact sha256:{receipt.artifact_id[:12]}"
    )


def _demo_table(result: "DemoResult") -> str:
    head = (
        "bit-width",
        "activations",
        "download",
        "bits/weight",
        "accuracy",
        "dedicated",
        "logits",
    )
    rows = [
        (
            str(row.bit_width),
            str(row.activation_width),
            _size(row.num_bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.accuracy:.2%}",
            f"{row.dedicated_accuracy:.2%}",
            "equal" if row.agrees else "DIFFER",
        )
        for row in result.rows
    ]
    return (
        f"{_table(head, rows, left=set())}\n\n"
        f"accuracy on {result.num_test} test digits; the float model has "
        f"{result.float_accuracy:.2%}.\n"
        "download: header and layers up to that bit-width; bits/weight counts all of it.\n"
        "dedicated: trained for that bit-width alone, same recipe, same number of epochs.\n"
        "logits: of the loaded prefix against the trained model at that bit-width, bit for bit."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: set[int]) -> str:
    """Columns two spaces apart, numbers to the right, those in ``left`` to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    """``12.30 kB``, in powers of 1000."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= power:
            return f"{num_bytes / power:.2f} {unit}"
    return f"{num_bytes} B"


@contextlib.contextmanager
def _progress_bars() -> Iterator["Progress"]:
    """A bar on stderr for each long part."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield update


def _load_checkpoint(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist; check the path.") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        raise SourceError(
            f"{path} cannot be loaded as a state dict; write it with "
            "torch.save(model.state_dict(), path)."
        ) from error


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be created ({error.strerror}); choose another --out."
        ) from error


@contextlib.contextmanager
def _needed_for(what: str, *, extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {error.name}, which is not installed; "
            f'install it with: pip install "plyweight[{extra}]"'
        ) from error
