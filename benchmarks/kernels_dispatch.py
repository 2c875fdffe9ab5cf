"""From how many rows on is it faster to decode a weight and let torch multiply?

    python benchmarks/kernels_dispatch.py                    a minute; prints, and writes nothing
    python benchmarks/kernels_dispatch.py --threads 2 --bits 8

It is what DENSE_ROWS of plyweight.nn.kernel_weight decides by. For every kernel that runs, dtype
and number of rows: median milliseconds of the kernel in the mode "float" and of decoding and torch,
turn by turn, and how many times as fast decoding is; from 1 on DENSE_ROWS should dispatch.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import nn
from turns import seconds

import plyweight
from plyweight.kernels import available
from plyweight.nn import kernel_weight

SIDE, ROWS = 1024, (1, 4, 8, 16, 64, 256, 512)
DTYPES = (torch.float32, torch.bfloat16)
MAX_TURNS = 30


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line, at most")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{SIDE} x {SIDE}, groups of 128, {options.bits} bits, {options.threads} threads\n")
    print("| kernel | dtype | rows | kernel, ms | decoding and torch, ms | decoding |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "net"
        with torch.inference_mode(False):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(SIDE, SIDE))
            model = plyweight.prepare(net, (options.bits,), activations=None, group_size=128)
            plyweight.pack(model, path)
        for kernel in available():
            if kernel == kernel_weight.REFERENCE:
                continue
            for dtype in DTYPES:
                net = nn.Sequential(nn.Linear(SIDE, SIDE)).to(dtype)
                weight = plyweight.load(path, net, kernel=kernel)[0].packed_weight
                for rows in ROWS:
                    x = torch.randn(rows, SIDE).to(dtype)
                    by_kernel, decoding = medians(weight, x, options.seconds)
                    print(
                        f"| {kernel} | {str(dtype)[6:]} | {rows} | {by_kernel * 1e3:.3f} | "
                        f"{decoding * 1e3:.3f} | {by_kernel / decoding:.2f} x |",
                        flush=True,
                    )


def medians(
    weight: kernel_weight.KernelWeight, x: torch.Tensor, budget_s: float
) -> tuple[float, float]:
    """Seconds of the kernel, and of decoding and torch."""
    key = weight.kernel.name, x.dtype
    kept = dict(kernel_weight.DENSE_ROWS)

    def call() -> None:
        weight.times(x, None)

    times: tuple[list[float], list[float]] = ([], [])
    try:
        stop = time.perf_counter() + budget_s
        while len(times[0]) < 3 or (len(times[0]) < MAX_TURNS and time.perf_counter() < stop):
            for found, most in zip(times, (len(x) + 1, 1), strict=True):
                kernel_weight.DENSE_ROWS[key] = most
                call()
                found.append(seconds(call))
    finally:
        kernel_weight.DENSE_ROWS.clear()
        kernel_weight.DENSE_ROWS.update(kept)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
