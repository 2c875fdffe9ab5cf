"""How accurate is every bit-width of the demo's one file, over several seeds?

    python benchmarks/digits.py                     # seeds 0, 1, 2; about six minutes on two cores
    python benchmarks/digits.py --seeds 0 1 2 3 4

Runs the recipe of `plyweight demo` for each seed (initialization, order of the data, random shifts;
the split of the 1,797 digits is fixed and stratified) and writes mean and spread as Markdown and
JSON to benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from plyweight.demo import BIT_WIDTHS, DemoResult, Recipe, run_demo

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run every seed, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results, seconds = [], []
    for seed in arguments.seeds:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            results.append(run_demo(folder, seed=seed))
        seconds.append(time.perf_counter() - started)
        print(f"seed {seed}: {seconds[-1]:.0f} s", file=sys.stderr)
    table = as_markdown(results)
    conditions = {
        "command": "python benchmarks/digits.py --seeds " + " ".join(map(str, arguments.seeds)),
        "recipe": vars(Recipe()),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("plyweight", "torch", "numpy", "scikit-learn")},
        },
        "seconds_per_seed": [round(s) for s in seconds],
        "date": time.strftime("%Y-%m-%d"),
    }
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [result.to_json() | {"path": Path(result.path).name} for result in results]
    (arguments.out / "digits.json").write_text(
        json.dumps({"conditions": conditions, "seeds": rows}, indent=1) + "\n"
    )
    (arguments.out / "digits.md").write_text(
        f"# Digits: one file against dedicated models\n\n{table}\n\n"
        f"`{conditions['command']}` · {conditions['machine']} · torch {version('torch')} · "
        f"{conditions['date']} · details in digits.json\n"
    )


def as_markdown(results: list[DemoResult]) -> str:
    """Mean and range over the seeds, in percent."""
    lines = [
        "| bit-width | activations | download | one file | dedicated | difference | logits equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for index, bit_width in enumerate(BIT_WIDTHS):
        rows = [result.rows[index] for result in results]
        layered = [100 * row.accuracy for row in rows]
        dedicated = [100 * row.dedicated_accuracy for row in rows]
        difference = statistics.mean(layered) - statistics.mean(dedicated)
        lines.append(
            f"| {bit_width} | {rows[0].activation_width} | {rows[0].num_bytes / 1000:.1f} kB "
            f"| {_summary(layered)} | {_summary(dedicated)} | {difference:+.2f} "
            f"| {all(row.agrees for row in rows)} |"
        )
    floats = [100 * result.float_accuracy for result in results]
    lines.append(f"\nfloat model {_summary(floats)}; {results[0].num_test} test digits")
    return "\n".join(lines)


def _summary(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} % ({min(values):.2f} - {max(values):.2f})"


if __name__ == "__main__":
    main()
