"""What the CIFAR-10 example tells while it trains: a bar, a line an epoch, CSV, TensorBoard.

The history of a run is part of its checkpoint, and the CSV file is written from it anew after every
epoch: what a killed run had logged beyond its last checkpoint does not stay behind.
"""

import csv
import io
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from plyweight.artifact import publish_atomically

__all__ = ["History", "Log", "LogError", "say", "summary_writer_class"]

# A row for each epoch: "epoch", "step", "seconds", "learning_rate", "loss/2", "accuracy/2" ...
History = list[dict[str, float]]

BETWEEN_LOSSES_S = 1.0  # reading a loss from a GPU waits for it, so the bar does it seldom


class LogError(Exception):
    """A log that was asked for cannot be kept."""


class Log:
    """The log of one stage; a context manager, for the bar owns the last lines of the terminal."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        *,
        num_steps: int,
        num_epochs: int,
        is_shown: bool = True,
        to_tensorboard: bool = False,
    ) -> None:
        """Log to ``folder / f"{stage}.csv"``.

        Args:
            folder: for the files.
            stage: of training, "float" or "once-qat".
            num_steps: of the whole stage.
            num_epochs: of the whole stage.
            is_shown: False in all processes but the first, where nothing is logged.
            to_tensorboard: whether to write events for TensorBoard too.

        Raises:
            LogError: If TensorBoard is wanted and not installed.
        """
        self.path = folder / f"{stage}.csv"
        self.stage, self.num_epochs, self.is_shown = stage, num_epochs, is_shown
        self._events: Any = None
        self._events_folder = folder / "tensorboard" / stage
        self._writer_class = summary_writer_class() if to_tensorboard and is_shown else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[losses]}"),
        )
        self._bars = Progress(*columns, console=Console(stderr=True), disable=not is_shown)
        self._task = self._bars.add_task(stage, total=num_steps, losses="")
        self._losses_shown_at = 0.0

    def __enter__(self) -> "Log":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()
        if self._events is not None:
            self._events.close()

    def resume(self, step: int, history: History) -> None:
        """Go on after ``step`` steps, of which ``history`` tells."""
        self._bars.reset(self._task, total=self._bars.tasks[0].total, completed=step)
        if self._writer_class is not None:
            folder = str(self._events_folder)
            # Steps that a killed run logged beyond its last checkpoint are not shown any more.
            self._events = self._writer_class(folder, purge_step=step + 1)
        if history:
            self._write_csv(history)

    def step(self, step: int, losses: dict[str, Any]) -> None:
        """After ``step`` steps; the losses are those of the last one."""
        if not self.is_shown:
            return
        now = time.monotonic()
        if now - self._losses_shown_at >= BETWEEN_LOSSES_S:
            self._losses_shown_at = now
            shown = "  ".join(f"{name}: {float(loss):.2f}" for name, loss in losses.items())
            self._bars.update(self._task, completed=step, losses=f"loss {shown}")
        else:
            self._bars.update(self._task, completed=step)

    def epoch(self, history: History) -> None:
        """After an epoch, of which the last row of ``history`` tells."""
        if not self.is_shown:
            return
        row = history[-1]
        names = [key.removeprefix("loss/") for key in row if key.startswith("loss/")]
        figures = "   ".join(
            f"{name} {row[f'loss/{name}']:.3f} {row.get(f'accuracy/{name}', float('nan')):6.2%}"
            for name in names
        )
        self._bars.console.print(
            f"{self.stage}  epoch {row['epoch']:3.0f} of {self.num_epochs}"
            f"  {row['seconds']:.0f} s   {figures}",
            highlight=False,
            soft_wrap=True,
        )
        self._write_csv(history)
        if self._events is not None:
            for key, value in row.items():
                if "/" in key or key == "learning_rate":
                    self._events.add_scalar(key, value, int(row["step"]))
            self._events.flush()

    def _write_csv(self, history: History) -> None:
        if not self.is_shown:
            return
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in history for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in history:
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})
        with publish_atomically(self.path) as file:
            file.write(text.getvalue().encode())


def summary_writer_class() -> Any:
    """What writes events for TensorBoard.

    Raises:
        LogError: If the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LogError(
            "--tensorboard needs the package tensorboard, which is not installed; install it with "
            "pip install tensorboard, or leave the option away: the CSV files hold the same."
        ) from error
    return SummaryWriter


def say(sentence: str) -> None:
    """To whoever waits at the terminal; results go to stdout."""
    print(f"cifar10: {sentence}", file=sys.stderr)
