"""demo and pack: the commands that train or read what was trained; they need torch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from plyweight.cli.calling import AsJson, needed_for, print_json
from plyweight.cli.show import demo_table, epoch_bars, size
from plyweight.errors import OutputError, SourceError

__all__ = ["demo", "pack"]


def demo(
    fast: Annotated[bool, typer.Option("--fast", help="Train less; under 40 seconds.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="The same seed makes the same file.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the file and the figure go.")
    ] = Path("plyweight-demo"),
    graph: Annotated[
        bool, typer.Option("--graph", help="Pack the graph too, and answer without torch.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, pack and load at 1 to 8 bits on real handwritten digits."""
    with needed_for("plyweight demo", extra="demo"):
        import matplotlib  # noqa: F401  missed now, not after the training
        import sklearn  # noqa: F401

        from plyweight.demo import FAST, Recipe, draw, run_demo
    if graph:
        with needed_for("plyweight demo --graph", extra="onnx"):
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    _create_folder(out)  # before the training, not after
    with epoch_bars() as progress:
        recipe = FAST if fast else Recipe()
        result = run_demo(out, seed=seed, recipe=recipe, progress=progress, graph=graph)
    figure = out / "digits.png"
    draw(result, figure)
    if as_json:
        print_json(result.to_json() | {"figure": str(figure)})
        return
    typer.echo(demo_table(result))
    typer.echo(f"\nfile    {result.path}\nfigure  {figure}")


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
    with needed_for("plyweight pack", extra="train"):
        from plyweight.packing import pack as pack_state
    if artifact.resolve() == checkpoint.resolve():
        raise OutputError(f"{artifact} is the checkpoint itself; give the artifact another path.")
    state = _load_checkpoint(checkpoint)
    receipt = pack_state(
        state, artifact, name=name or checkpoint.stem, revision=revision, license=license
    )
    if as_json:
        print_json(receipt.to_json())
        return
    widths = ", ".join(map(str, receipt.held))
    total = size(receipt.layers[-1].total_bytes)
    typer.echo(f"{artifact}  {total}  {receipt.num_layered} layered weights  {widths} bits")


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
