"""How fast do codes become bit planes, and planes codes again?

    python benchmarks/codec.py                  # a minute on one core

Of 1 to 8 planes: pack (``to_planes``) and unpack (``from_planes``) by every kernel that runs here,
and the definitions that all must equal, against ``numpy.copy`` of the codes. All in one process and
one thread, one of each in turn, medians. Figures are GB/s of codes (a code is a byte) for each
core: time is what the process spent on a CPU, so that what else the machine does changes little.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from results_files import write_results

from plyweight import native
from plyweight.codec import codes_at, from_planes, to_planes
from plyweight.codec.planes import from_planes_reference, to_planes_reference

RESULTS = Path(__file__).parent / "results"
BIT_WIDTHS = range(1, 9)
KERNELS = native.available()
COLUMNS = (*KERNELS, "definition")


def main() -> None:
    """Measure, print the table, and write it with its conditions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # Below 32 MiB: from there on every call gets new pages, which the system has to clear.
    parser.add_argument("--codes", type=int, default=30_000_000, help="how many")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    variants = variants_of(options.codes)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in variants}
    for _ in range(options.rounds):
        for key, run in variants.items():
            run()  # what ran before gave its memory back: this takes the pages that the next needs
            started = time.process_time()
            run()
            seconds[key].append(time.process_time() - started)
    rows = [
        {
            "what": what,
            "bit_width": bit_width,
            "gb_per_s": options.codes / statistics.median(found) / 1e9,
            "range": [options.codes / f(found) / 1e9 for f in (max, min)],
        }
        for (what, bit_width), found in seconds.items()
    ]
    table = as_markdown(rows)
    print(table)
    write(options, table, rows)


def variants_of(num_codes: int) -> dict[tuple[str, int], Callable[[], object]]:
    """What is timed, by name and bit-width; 0 stands for the copy."""
    codes = np.random.default_rng(0).integers(0, 256, num_codes, dtype=np.uint8)
    variants: dict[tuple[str, int], Callable[[], object]] = {("copy", 0): codes.copy}
    for bit_width in BIT_WIDTHS:
        held = codes_at(codes, bit_width)
        planes = to_planes_reference(held, bit_width)
        for kernel in KERNELS:
            assert np.array_equal(to_planes(held, bit_width, kernel=kernel), planes)
            assert np.array_equal(from_planes(planes, held.shape, kernel=kernel), held)
            variants |= {
                (f"pack, {kernel}", bit_width): lambda c=held, b=bit_width, k=kernel: to_planes(
                    c, b, kernel=k
                ),
                (f"unpack, {kernel}", bit_width): lambda p=planes, c=held, k=kernel: from_planes(
                    p, c.shape, kernel=k
                ),
            }
        variants |= {
            ("pack, definition", bit_width): lambda c=held, b=bit_width: to_planes_reference(c, b),
            ("unpack, definition", bit_width): lambda p=planes, c=held: from_planes_reference(
                p, c.shape
            ),
        }
    return variants


def as_markdown(rows: list[dict]) -> str:
    """A table for each direction, one line for each bit-width."""
    cells = {
        (row["what"], row["bit_width"]): "{:.2f} ({:.2f} - {:.2f})".format(
            row["gb_per_s"], *row["range"]
        )
        for row in rows
    }
    lines = []
    for direction in ("pack", "unpack"):
        lines += [
            f"| {direction}, planes | {' | '.join(COLUMNS)} |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for bit_width in BIT_WIDTHS:
            values = " | ".join(cells[f"{direction}, {column}", bit_width] for column in COLUMNS)
            lines.append(f"| {bit_width} | {values} |")
        lines.append("")
    return "\n".join([*lines, f"A copy: {cells['copy', 0]} GB/s."])


def write(options: argparse.Namespace, table: str, rows: list[dict]) -> None:
    """Table and figures, with their conditions, to benchmarks/results/."""
    conditions = {
        "command": f"python benchmarks/codec.py --codes {options.codes} --rounds {options.rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor()}, 1 thread",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("plyweight", "numpy")},
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    page = (
        f"# Codes and planes, in GB/s of codes per core\n\n{table}\n\n"
        f"`{conditions['command']}` · {conditions['machine']} · numpy {version('numpy')} · "
        f"{conditions['date']} · CPU time, median (smallest - largest) of {options.rounds}\n"
    )
    write_results(RESULTS, "codec", page, {"conditions": conditions, "rows": rows})


def processor() -> str:
    """The model of the CPU, where the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


if __name__ == "__main__":
    main()
