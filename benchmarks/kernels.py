"""How fast are products with bit planes, beside what others multiply weight-only with on a CPU?

    python benchmarks/kernels.py                                everything, half an hour
    python benchmarks/kernels.py --shape 4096x4096 --threads 2  a piece, which joins the others
    python benchmarks/kernels.py --tables                       the tables, from the JSON
    python benchmarks/kernels.py --quick --out FOLDER           whether it runs at all

A piece is a shape and a number of threads; it replaces itself in benchmarks/results/kernels.json,
and the tables are made anew from all pieces, README's too. In a round each variant has a turn, as
turns.py says; its time is the median of the rounds' medians, its fastest that of all requests.

One matrix holds the planes of all eight bit-widths, as a loaded model does, for each granularity:
by output channel, and groups of 128 and 32. Bandwidth is that of reading as many bytes as the
planes of the bit-width are, from a buffer that is read again and again.

Without the native library it measures what others do, and says that it is missing.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from kernels_others import Product, onnxruntime_nbits, torch_dense, torch_int4, torch_int8
from kernels_tables import as_markdown, short
from turns import turn

from plyweight import native
from plyweight.artifact import publish_atomically
from plyweight.kernels import MODES, PlaneMatrix, pick
from plyweight.kernels.reference import error_bound, float_product, int8_product

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
SHAPES = ("4096x4096", "11008x4096", "1024x1024", "512x2048", "32768x8192")
BATCHES, BIT_WIDTHS, GROUPS = (1, 4, 16, 64), range(1, 9), (None, 128, 32)
MIN_ROUNDS, MAX_ROUNDS = 3, 12
CHECKED_ROWS = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the pieces asked for, and write what there is now."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=SHAPES, help="out x in")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="rows, m")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each shape, threads and m")
    parser.add_argument("--kernel", default="auto", help="of ours")
    parser.add_argument("--quick", action="store_true", help="a small shape and a round")
    parser.add_argument("--tables", action="store_true", help="measure nothing, only write tables")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.seconds, options.batch = ["512x2048"], 0.0, [1, 16]
    path = options.out / "kernels.json"
    found = json.loads(path.read_text()) if path.exists() else {"pieces": {}}
    if options.tables:
        write(found, options.out)
        return
    for shape in options.shape:
        for threads in options.threads:
            piece = measured(shape, threads, options)
            kept = found["pieces"].get(f"{shape} {threads}", {}).get("batches", {})
            piece["batches"] = kept | piece["batches"]
            found["pieces"][f"{shape} {threads}"] = piece
            write(found, options.out)
    print((options.out / "kernels.md").read_text())


def measured(shape: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """A piece: the median seconds of every variant at every number of rows."""
    out, num_inputs = map(int, shape.split("x"))
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out, num_inputs), dtype=np.float32) * np.float32(0.02)
    variants = others(weight, threads)
    kernel = pick(options.kernel)
    if kernel.name == native.REFERENCE:
        print(f"ours are left out: {native.missing_because() or 'the reference was asked for'}")
    else:
        variants |= ours(weight, threads, options.kernel)
    del weight
    batches = {}
    for m in options.batch:
        x = rng.standard_normal((m, num_inputs), dtype=np.float32)
        batches[str(m)] = interleaved(variants, x, options.seconds)
        print(f"{shape}, {threads} threads, m = {m}: {batches[str(m)]['rounds']} rounds")
    sizes = {name: product.weight_bytes for name, product in variants.items()}
    return {
        "kernel": kernel.name,
        "batches": batches,
        "weight_bytes": sizes,
        "bandwidth": {
            str(b): bandwidth(out * num_inputs * b // 8, threads, options.quick) for b in BIT_WIDTHS
        },
        "conditions": conditions(seconds=options.seconds),
    }


def others(weight: np.ndarray, threads: int) -> dict[str, Product]:
    """What is not ours."""
    found = {
        "torch float32": torch_dense(weight, torch.float32),
        "torch bfloat16": torch_dense(weight, torch.bfloat16),
        "torch int8": torch_int8(weight),
    }
    for group in GROUPS[1:]:
        found[f"torch int4 g{group}"] = torch_int4(weight, group)
        for bits in (2, 4, 8):
            name = f"ONNX Runtime {bits} g{group}"
            found[name] = onnxruntime_nbits(weight, bits, group, threads)
    return found


def ours(weight: np.ndarray, threads: int, kernel: str) -> dict[str, Product]:
    """Every width and mode from one matrix for each granularity."""
    found = {}
    for group in GROUPS:
        matrix, scale = held(weight, group, kernel)
        ready = matrix.ready_scale(scale)  # as a loaded model holds it
        for mode in MODES:
            for bit_width in BIT_WIDTHS:
                check(matrix, scale, bit_width, mode, threads)

                def run(x: Any, b: int = bit_width, m: Any = mode, h: Any = (matrix, ready)) -> Any:
                    return h[0].product(x, h[1], b, mode=m, num_threads=threads)

                num_bytes = matrix.nbytes * bit_width // 8 + scale.nbytes
                product = Product(run, lambda x: x, num_bytes)
                found[f"plyweight {mode} {bit_width} g{group or '-'}"] = product
    return found


def held(weight: np.ndarray, group: int | None, kernel: str) -> tuple[PlaneMatrix, np.ndarray]:
    """A matrix of all planes of ``weight``, with its scale; a block of rows at a time."""
    from plyweight.codec import encode, spread, to_planes

    out, num_inputs = weight.shape
    grouped = weight.reshape(out, -1, group or num_inputs)
    scale = (np.abs(grouped).max(axis=2) / 127).astype(np.float32)
    scale = scale[:, 0].copy() if group is None else scale
    codes = np.empty(weight.shape, np.uint8)
    for start in range(0, out, 1024):
        rows = slice(start, start + 1024)
        block = weight[rows]
        codes[rows] = encode(block, spread(scale[rows], block.shape, group))
    matrix = pick(kernel).matrix(weight.shape, group_size=group)
    for plane in to_planes(codes, 8):
        matrix.add_plane(plane)
    return matrix, scale


def check(matrix: PlaneMatrix, scale: np.ndarray, bit_width: int, mode: Any, threads: int) -> None:
    """Compare the first outputs with the reference: what is timed is right."""
    x = np.random.default_rng(1).standard_normal((2, matrix.shape[1])).astype(np.float32)
    rows = min(CHECKED_ROWS, matrix.shape[0])
    y = matrix.product(x, scale, bit_width, mode=mode, num_threads=threads)[:, :rows]
    given = x, matrix.levels(bit_width, 0, rows), scale[:rows], matrix.group_size
    if mode == "int8":
        is_right = np.array_equal(y, int8_product(*given))
    else:
        is_right = (abs(y - float_product(*given)) <= error_bound(*given)).all()
    if not is_right:
        raise SystemExit(f"{matrix.kernel} at {bit_width} bits, {mode}, is not the reference")


def interleaved(variants: dict[str, Product], x: np.ndarray, budget_s: float) -> dict[str, Any]:
    """Median, smallest and largest seconds of a request; as many rounds as the budget allows."""
    inputs = {name: product.of(x) for name, product in variants.items()}
    turns: dict[str, list[list[float]]] = {name: [] for name in variants}
    stop, rounds = time.perf_counter() + budget_s, 0
    with torch.inference_mode():
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() < stop):
            rounds += 1
            for name, product in variants.items():
                given = inputs[name]
                turns[name].append(turn(lambda run=product.run, given=given: run(given)))
    return {
        "rounds": rounds,
        "seconds": {
            name: [
                statistics.median(map(statistics.median, found)),
                min(map(min, found)),
                max(map(max, found)),
            ]
            for name, found in turns.items()
        },
    }


def bandwidth(num_bytes: int, threads: int, is_quick: bool) -> float:
    """Bytes a second that ``threads`` read of a buffer of that size, the best of several ways."""
    words = np.ones(max(num_bytes // 8, 8 * threads), np.uint64)
    parts = np.array_split(words, threads)
    passes = max(int(2e8 / words.nbytes), 1) if not is_quick else 1
    ways: list[Callable[[np.ndarray], object]] = [
        lambda part: np.maximum.reduce(part.view(np.uint8)),
        lambda part: np.bitwise_or.reduce(part),
        lambda part: np.add.reduce(part),
    ]

    def read(part: np.ndarray, way: Callable[[np.ndarray], object]) -> None:
        for _ in range(passes):
            way(part)

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for way in ways * 3:
            started = time.perf_counter()
            list(pool.map(lambda part, way=way: read(part, way), parts))
            best = max(best, passes * words.nbytes / (time.perf_counter() - started))
    return best


def conditions(**of_the_run: object) -> dict[str, Any]:
    """Of a piece."""
    return {
        **of_the_run,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor()}",
        "versions": {
            name: version(name) for name in ("plyweight", "torch", "onnxruntime", "numpy")
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The model of the CPU, where the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def write(found: dict[str, Any], folder: Path) -> None:
    """All pieces as JSON, and the tables that follow from them; README's where they are ours."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[Path, str] = {
        folder / "kernels.json": json.dumps(found, indent=1) + "\n",
        folder / "kernels.md": as_markdown(found),
    }
    if folder == RESULTS:
        texts[README] = with_table(README.read_text(), short(found))
    for path, text in texts.items():
        with publish_atomically(path) as file:
            file.write(text.encode())


def with_table(page: str, lines: list[str]) -> str:
    """``page`` with the table in ``lines`` where it has one with the same head."""
    table = [line for line in lines if line.startswith("|")]
    before, head, rest = page.partition(table[0] + "\n")
    if not head:
        raise SystemExit(f"README has no table that begins with {table[0]!r}")
    rows = rest.splitlines(keepends=True)
    num_rows = next(i for i, row in enumerate(rows) if not row.startswith("|"))
    return before + "\n".join(table) + "\n" + "".join(rows[num_rows:])


if __name__ == "__main__":
    main()
