"""How fast do planes on a GPU multiply, beside the bytes that they are and a dense product?

    python benchmarks/kernels_gpu.py                    on a GPU; some minutes
    python benchmarks/kernels_gpu.py --tune --rows 1    measures the plans of launching first
    python benchmarks/kernels_gpu.py --interpret        without one: are results right? No times

Every time is of one product in a CUDA graph of many, each with a copy of the weight of its own,
128 MB or more in all, so that no weight is in the second cache when its turn comes. A graph is
replayed 20 times; medians. "Of the bytes" is what planes, scales, activations and results are, over
the time, as a share of the bandwidth of a copy of 1 GB that this script measures; "dense" is
torch's product in the same graph with a weight in bfloat16.

Results go to benchmarks/results/kernels-<gpu>.json and .md.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plyweight.codec import decode, from_planes, plane_bytes, spread
from plyweight.kernels import pick, triton_launch
from plyweight.kernels.triton_matrix import TritonMatrix

ROOT = Path(__file__).parent
SHAPES = ((4096, 4096), (11008, 4096), (8192, 28672))
ROWS = (1, 4, 16, 64, 128)
BITS = tuple(range(1, 9))
# Activations, and inputs that share a scale.
KINDS = ((torch.bfloat16, None), (torch.bfloat16, 128), (torch.float16, None))
COLD_BYTES, MAX_COPIES, REPLAYS = 2**27, 64, 20
TINY = {"shapes": ((40, 300),), "rows": (1, 17, 65), "bits": (2, 3, 8)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, check and write the tables; or only check, in Triton's interpreter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="tiny shapes, results only")
    parser.add_argument("--tune", action="store_true", help="measure how to launch, too")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.interpret:
        cases = [
            checked(matrix_of(shape, group_size, "cpu"), rows, bits, dtype)
            for (dtype, group_size), shape in product(KINDS, TINY["shapes"])
            for rows, bits in product(TINY["rows"], TINY["bits"])
        ]
        print(f"{len(cases)} products are those of the reference; nothing was timed")
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "kernels_gpu.py measures on a GPU, and torch finds none here. "
            "--interpret checks the results without one."
        )
    found: dict[str, Any] = {"machine": machine(), "copy_bytes_per_s": copy_bandwidth()}
    found["cases"] = [
        case
        for shape in SHAPES
        for case in measured(shape, options.rows, options.bits, found["copy_bytes_per_s"], options)
    ]
    write(found, options.out)


def matrix_of(shape: tuple[int, int], group_size: int | None, device: str) -> TritonMatrix:
    """Eight planes of random bits."""
    matrix = pick("triton", device=device).matrix(shape, group_size=group_size)
    assert isinstance(matrix, TritonMatrix)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(8):
        size = (plane_bytes(shape),)
        plane = torch.randint(256, size, generator=generator, device=device)
        if shape[0] * shape[1] % 8:
            plane[-1] = 0
        matrix.add_plane(plane.to(torch.uint8))
    return matrix


def scale_of(matrix: TritonMatrix) -> Tensor:
    groups = () if matrix.group_size is None else (matrix.num_groups,)
    return torch.rand((matrix.shape[0], *groups), device=matrix.device) / 4096 + 1e-4


def checked(matrix: TritonMatrix, rows: int, bits: int, dtype: torch.dtype) -> None:
    """Raise if a product, or a decoded weight, is not what the definition says."""
    out, inputs = matrix.shape
    scale = scale_of(matrix)
    x = torch.randn(rows, inputs, device=matrix.device).to(dtype)
    values = matrix.values(scale, bits, torch.float32)
    some = (min(16, out), inputs)  # whole bytes of every plane
    planes = [matrix.plane(index)[: plane_bytes(some)].cpu().numpy() for index in range(bits)]
    factors = spread(scale[: some[0]].cpu().numpy(), some, matrix.group_size)
    expected = decode(from_planes(planes, some), bits).astype(np.float32) * factors
    if not np.array_equal(values[: some[0]].cpu().numpy(), expected):
        raise AssertionError(f"{matrix.shape} at {bits} bits is decoded wrongly")
    y = matrix.product(x, scale, bits, mode="float").float()
    exact = x.double() @ values.double().T
    # A sum in float32, and one rounding to the dtype; more rows than are fused multiply with a
    # weight that is rounded, too.
    terms = x.double().abs() @ values.double().abs().T
    bound = terms * (inputs * 2.0**-23 + (torch.finfo(dtype).eps if rows > 64 else 0))
    bound += exact.abs() * torch.finfo(dtype).eps + 1e-6
    if not ((y - exact).abs() <= bound).all():
        raise AssertionError(f"{matrix.shape} at {bits} bits, {rows} rows {dtype}: wrong product")


def measured(
    shape: tuple[int, int],
    all_rows: Sequence[int],
    all_bits: Sequence[int],
    bandwidth: float,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """All cases of one shape."""
    dense = {rows: dense_seconds(shape, rows) for rows in all_rows}
    cases = []
    for dtype, group_size in KINDS:
        matrix = matrix_of(shape, group_size, "cuda")
        scale = scale_of(matrix)
        for rows, bits in product(all_rows, all_bits):
            checked(matrix, rows, bits, dtype)
            x = torch.randn(rows, shape[1], device="cuda").to(dtype)
            copies = copies_of(matrix, bits)
            if options.tune and rows <= triton_launch.MAX_ROWS:
                matrix.tune(x, bits, partial(seconds_of, x, scale, copies, replays=5))
            seconds = seconds_of(x, scale, copies)
            moved = sum(plane.nbytes for plane in matrix._planes[:bits]) + scale.nbytes
            moved += x.nbytes + rows * shape[0] * x.element_size()
            cases.append(
                {
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "group_size": group_size,
                    "rows": rows,
                    "bits": bits,
                    "seconds": seconds,
                    "of_the_bytes": moved / bandwidth / seconds,
                    "dense_seconds": dense[rows],
                }
            )
            print(line(cases[-1]), flush=True)
    return cases


def copies_of(matrix: TritonMatrix, bits: int) -> list[TritonMatrix]:
    """Matrices like ``matrix`` with planes of their own, more than the second cache holds."""
    each = sum(plane.nbytes for plane in matrix._planes[:bits])
    copies = []
    for _ in range(min(-(-COLD_BYTES // each), MAX_COPIES)):
        copy = TritonMatrix(matrix.shape, group_size=matrix.group_size, device=matrix.device)
        copy._planes = [plane.clone() for plane in matrix._planes[:bits]]
        copies.append(copy)
    return copies


def seconds_of(
    x: Tensor,
    scale: Tensor,
    copies: list[TritonMatrix],
    plan: triton_launch.Plan | None = None,
    *,
    replays: int = REPLAYS,
) -> float:
    """Of a product, launched as ``plan`` says, or as a matrix does by itself."""

    def run(copy: TritonMatrix) -> object:
        if plan is None:
            return copy.product(x, scale, copy.num_planes, mode="float")
        return triton_launch.product(x, copy._planes, scale, copy.shape[0], copy.group_size, plan)

    return graph_seconds([partial(run, copy) for copy in copies], replays)


def dense_seconds(shape: tuple[int, int], rows: int) -> float:
    """Of torch's product in bfloat16."""
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    copies = [weight.clone() for _ in range(min(-(-COLD_BYTES // weight.nbytes), MAX_COPIES))]
    return graph_seconds([lambda copy=copy: F.linear(x, copy) for copy in copies])


def graph_seconds(runs: list[Callable[[], object]], replays: int = REPLAYS) -> float:
    """The median time of one of ``runs``, in a graph of all."""
    for run in runs[:2]:
        run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000 / len(runs))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written in a second by copies of 1 GB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds([lambda: target.copy_(source)] * 4)


def machine() -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", "benchmarks/kernels_gpu.py", *sys.argv[1:]]),
    }


HEAD = "| shape | activations | group | m | bits | µs | of the bytes | dense, µs | times dense |"


def line(case: dict[str, Any]) -> str:
    """One case as a row of the table."""
    return (
        f"| {case['shape'][0]} x {case['shape'][1]} | {case['dtype']} | {case['group_size'] or ''} "
        f"| {case['rows']} | {case['bits']} | {case['seconds'] * 1e6:.1f} "
        f"| {case['of_the_bytes']:.0%} | {case['dense_seconds'] * 1e6:.1f} "
        f"| {case['dense_seconds'] / case['seconds']:.2f} |"
    )


def write(found: dict[str, Any], folder: Path) -> None:
    """The JSON and the Markdown of one run."""
    name = re.sub(r"\W+", "-", found["machine"]["gpu"].lower()).strip("-")
    (folder / f"kernels-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    about = "\n".join(f"* {key}: {value}" for key, value in found["machine"].items())
    rows = "\n".join(line(case) for case in found["cases"])
    (folder / f"kernels-{name}.md").write_text(
        f"# Planes on a GPU\n\n{about}\n"
        f"* bandwidth of a copy: {found['copy_bytes_per_s'] / 1e9:.0f} GB/s\n\n"
        "Times dense: how many times faster than torch's product in bfloat16; below 1 is slower.\n"
        f"\n{HEAD}\n|{'---|' * HEAD.count('|', 1)}\n{rows}\n"
    )


if __name__ == "__main__":
    main()
