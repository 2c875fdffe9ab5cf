"""Is every bit-width of one layered artifact as good as a model trained for that width alone?

    python benchmarks/accuracy.py --data ../shared/data/cifar10 --compile default
    python benchmarks/accuracy.py --data FOLDER --net resnet20 --seeds 0 1 2 --compile cuda-graphs
    python benchmarks/accuracy.py --data FOLDER --only layered:0 dedicated-2:0     a part of it
    python benchmarks/accuracy.py --report                      the tables of what there is

For each seed: a float network; from it, by the same code, recipe, epochs and images

    layered       one artifact with all bit-widths
    layered-all   the same, trained with all bit-widths in every step, without the sandwich rule
    dedicated-B   a model of a single bit-width
    calibrated    the float network with grids chosen from data, without training

Every run is one command of examples/cifar10.py, in a folder of its own under --runs: a second start
resumes what was broken off and skips what is done, and two starts share the runs between them.
Accuracies are those of the loaded artifacts. What follows `--` goes to every run.
"""

import argparse
import contextlib
import fcntl
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import cifar10
import torch
from accuracy_found import ALL_WIDTHS, BIT_WIDTHS, Found, Run, percentages
from cifar10_nets import NETS

from plyweight.artifact import publish_atomically

KINDS = {"held_out": "held-out", "official": "official test"}


def main() -> int:
    """Make the runs that are missing, then the report; the exit code."""
    arguments, others = split(sys.argv[1:])
    options = parser().parse_args(arguments)
    runs = options.runs / options.net
    wanted = options.only or [
        *(Run("float", seed) for seed in options.seeds),
        *(Run("layered", seed) for seed in options.seeds),
        *(Run(ALL_WIDTHS, seed) for seed in options.seeds if options.all_widths),
        *(Run(f"dedicated-{b}", seed) for seed in options.seeds for b in options.dedicated),
        *(Run("calibrated", seed) for seed in options.seeds),
    ]
    if not options.report:
        if options.data is None:
            parser().error("--data is needed to run anything")
        common = ["--data", str(options.data), "--net", options.net, "--compile", options.compile]
        for run in wanted:
            code = make(run, runs, [*common, *others])
            if code:
                return code
    return report(options.net, runs, options.out, others, is_asked=options.report)


def split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What is meant for this script, and what for every run."""
    if "--" not in arguments:
        return arguments, []
    index = arguments.index("--")
    return arguments[:index], arguments[index + 1 :]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10")
    made.add_argument("--net", choices=list(NETS), default="resnet8")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--dedicated", type=int, nargs="*", default=[8, 2], metavar="B")
    made.add_argument("--all-widths", action="store_true", help="without the sandwich rule too")
    made.add_argument("--only", type=Run.parse, nargs="+", metavar="NAME:SEED")
    made.add_argument("--compile", default="none", help="as for the example")
    made.add_argument("--runs", type=Path, default=Path("runs/accuracy"), metavar="FOLDER")
    made.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    made.add_argument("--report", action="store_true", help="only the tables")
    return made


def make(run: Run, runs: Path, common: Sequence[str]) -> int:
    """Make ``run`` unless it is done or another process is at it; the exit code."""
    if run.name != "float":
        # Waits for the process that is training it, if there is one.
        code = make_alone(Run("float", run.seed), runs, common, is_waiting=True)
        if code:
            return code
    return make_alone(run, runs, common, is_waiting=False)


def make_alone(run: Run, runs: Path, common: Sequence[str], *, is_waiting: bool) -> int:
    if results_of(run, runs) is not None:
        return 0
    with locked(runs, run, is_waiting=is_waiting) as is_mine:
        if not is_mine or results_of(run, runs) is not None:
            return 0
        print(f"{run} ...", file=sys.stderr, flush=True)
        torch.compiler.reset()  # it keeps a handful of graphs, and would fall back to eager
        return cifar10.main([*common, *run.command(runs)])


@contextlib.contextmanager
def locked(runs: Path, run: Run, *, is_waiting: bool) -> Iterator[bool]:
    """Whether this process alone may make ``run`` now; a lock dies with its process."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f".{run.name}-{run.seed}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def results_of(run: Run, runs: Path) -> dict[str, Any] | None:
    """What ``run`` found, or None if it is not done."""
    path = run.folder(runs) / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def report(net: str, runs: Path, out: Path, others: Sequence[str], *, is_asked: bool) -> int:
    """Write tables, figures and logs of the runs that are done; the exit code."""
    found = Found.under(runs)
    if not any(run.name == "layered" for run in found.results):
        print(f"{runs} has no layered run that is done; there is nothing to report.")
        return 1 if is_asked else 0
    summary = {kind: found.rows(kind) for kind in KINDS if found.num_images(kind)}
    tables = "\n\n".join(as_markdown(found, kind, rows) for kind, rows in summary.items())
    print(tables)
    conditions = found.conditions()
    # All that the parts of it together are, wherever the data lie.
    command = " ".join(
        [
            f"python benchmarks/accuracy.py --data FOLDER --net {net} --seeds",
            *map(str, sorted({run.seed for run in found.results if run.name == "layered"})),
            "--dedicated",
            *(str(b) for b in reversed(BIT_WIDTHS) if found.of_kind(f"dedicated-{b}")),
            *(["--all-widths"] if found.of_kind(ALL_WIDTHS) else []),
            f"--compile {conditions['compile']}",
            *(["--", *others] if others else []),
        ]
    )
    conditions |= {"command": command, "date": time.strftime("%Y-%m-%d")}
    name = f"accuracy-{net}"
    logs = out / name
    logs.mkdir(parents=True, exist_ok=True)
    for run in found.results:
        for path in run.folder(runs).glob("*.csv"):
            shutil.copyfile(path, logs / f"{run.name}-{run.seed}.csv")
    content = {
        "conditions": conditions,
        "summary": summary,
        "runs": {str(run): results for run, results in found.results.items()},
    }
    page = (
        f"# {net} on CIFAR-10: one artifact against dedicated models\n\n{tables}\n\n"
        f"`{command}` · {conditions['machine']} · torch {conditions['versions']['torch']} · "
        f"{conditions['date']} · details in {name}.json, a log for each run in {name}/\n"
    )
    for ending, text in (("json", json.dumps(content, indent=1) + "\n"), ("md", page)):
        with publish_atomically(out / f"{name}.{ending}") as file:
            file.write(text.encode())
    draw(net, found, summary["held_out"], out / f"{name}.png")
    return 0


def as_markdown(found: Found, kind: str, rows: list[dict[str, Any]]) -> str:
    """One table: means over the seeds, their range, differences with their standard errors."""
    lines = [
        f"Accuracy on {found.num_images(kind):,} {KINDS[kind]} images, of the loaded artifact.",
        "",
        "| bits | bytes | one artifact | to float | dedicated | artifact - dedicated "
        "| all widths every step | artifact - that | calibrated | to float |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['bit_width']} | {row['num_bytes']:,} | {summarized(row['layered'])} "
        f"| {signed(row['layered_to_float'])} | {summarized(row['dedicated'])} "
        f"| {signed(row['layered_to_dedicated'])} "
        f"| {summarized(row['all_widths'])} | {signed(row['layered_to_all_widths'])} "
        f"| {summarized(row['calibrated'])} | {signed(row['calibrated_to_float'])} |"
        for row in rows
    ]
    of_float = percentages(found.right("float", "float", kind))
    lines += [
        "",
        f"The float network has {summarized(of_float)}. Seeds: {len(rows[0]['layered'])}; in "
        "brackets the smallest and the largest. After ± the standard error, paired by image.",
    ]
    return "\n".join(lines)


def summarized(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.2f} - {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f} %{spread}"


def signed(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:+.2f} ± {value[1]:.2f}"


def draw(net: str, found: Found, rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against bit-width, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    of_float = statistics.mean(percentages(found.right("float", "float", "held_out")))
    axes.axhline(of_float, color="0.6", lw=1, label="float network")
    series = {
        "layered": ("o-", "one artifact, this prefix of it"),
        "dedicated": ("s", "a dedicated model of that width"),
        "calibrated": ("^:", "one artifact, calibrated without training"),
    }
    for name, (style, label) in series.items():
        points = [(row["bit_width"], statistics.mean(row[name])) for row in rows if row[name]]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    trained = [value for row in rows for value in (*row["layered"], *row["dedicated"], of_float)]
    margin = 0.15 * (max(trained) - min(trained)) + 0.2
    # Calibration falls off a cliff at narrow widths; the rest would be a line at the top.
    axes.set_ylim(min(trained) - 2 * margin, max(trained) + margin)
    axes.set_xticks([row["bit_width"] for row in rows])
    axes.set_xlabel("bit-width of weights and activations")
    axes.set_ylabel(f"accuracy on {found.num_images('held_out'):,} held-out images (%)")
    axes.set_title(f"{net} on CIFAR-10", loc="left")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with publish_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
