"""Show: tables, sizes and bars, as a terminal shows them."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from plyweight.artifact import Receipt
    from plyweight.delivery import CachedEntry, Progress
    from plyweight.demo import DemoResult
    from plyweight.demo import Progress as EpochProgress

__all__ = [
    "cache_table",
    "demo_table",
    "epoch_bars",
    "receipt_table",
    "size",
    "table",
    "transfer_bar",
]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: set[int]) -> str:
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


def size(num_bytes: int) -> str:
    """``12.30 kB``, in powers of 1000."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= power:
            return f"{num_bytes / power:.2f} {unit}"
    return f"{num_bytes} B"


# --- tables -------------------------------------------------------------------------------------


def receipt_table(receipt: "Receipt") -> str:
    """A line for each layer, and what they have in common."""
    rows = [
        (
            "enhancement" if index else "base",
            str(layer.bit_width),
            size(layer.plane_bytes),
            size(layer.side_bytes),
            size(layer.padding_bytes),
            size(layer.num_bytes),
            size(layer.total_bytes),
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
        f"{table(head, rows, left={0, 8})}\n\n"
        f"header {size(receipt.header_bytes)} (in every total)  "
        f"{receipt.num_weights:,} weights in {receipt.num_layered} tensors  "
        f"artifact sha256:{receipt.artifact_id[:12]}"
    )


def demo_table(result: "DemoResult") -> str:
    """A line for each bit-width, and what the columns mean."""
    head = [
        "bit-width",
        "activations",
        "download",
        "bits/weight",
        "accuracy",
        "dedicated",
        "logits",
    ]
    rows = [
        [
            str(row.bit_width),
            str(row.activation_width),
            size(row.num_bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.accuracy:.2%}",
            f"{row.dedicated_accuracy:.2%}",
            "equal" if row.agrees else "DIFFER",
        ]
        for row in result.rows
    ]
    meanings = [
        f"accuracy on {result.num_test} test digits; the float model has "
        f"{result.float_accuracy:.2%}.",
        "download: header and layers up to that bit-width; bits/weight counts all of it.",
        "dedicated: trained for that bit-width alone, same recipe, same number of epochs.",
        "logits: of the loaded prefix against the trained model at that bit-width, bit for bit.",
    ]
    shares = [row.engine_agreement for row in result.rows if row.engine_agreement is not None]
    if shares:
        head.append("engine")
        for row, share in zip(rows, shares, strict=True):
            row.append(f"{share:.2%}")
        meanings.append("engine: digits that it, without torch, gives the trained model's class.")
    return "\n".join([table(head, rows, left=set()), "", *meanings])


def cache_table(entries: "Sequence[CachedEntry]") -> str:
    """A line for each artifact."""
    rows = [
        (
            entry.model,
            str(entry.revision),
            ", ".join(map(str, entry.bit_widths)) or "none",
            size(entry.num_bytes),
            entry.artifact_id,
        )
        for entry in entries
    ]
    return table(("model", "revision", "bits", "bytes", "artifact"), rows, left={0, 2, 4})


# --- bars ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def epoch_bars() -> Iterator["EpochProgress"]:
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


@contextlib.contextmanager
def transfer_bar() -> Iterator[Callable[["Progress"], None]]:
    """A bar on stderr with rate and time left, from the first report on; none on a pipe."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    bars: Bars | None = None

    def update(progress: "Progress") -> None:
        nonlocal bars
        if bars is None:
            bars = _transfer_bars()
            # What is here already is no part of the rate.
            bars.add_task("", total=progress.bytes_total, completed=progress.bytes_done)
            bars.start()
        bars.update(
            bars.task_ids[0],
            description=f"layer {progress.layer}",
            completed=progress.bytes_done,
            total=progress.bytes_total,
        )

    try:
        yield update
    finally:
        if bars is not None:
            bars.stop()


def _transfer_bars() -> "Bars":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
