"""How many instructions does a weight cost on the CPU?

    python benchmarks/kernels_counted.py --kernel avx2      needs valgrind; three minutes
    python benchmarks/kernels_counted.py --kernel avx512    Linux; seven minutes

Callgrind counts those of a process that computes 20 products of one row with a weight of
2048 x 512 in groups of 128, less those of one that computes none. What is left, over products and
weights, holds all that a call costs. Valgrind (3.19) knows no AVX-512, so processes of that variant
are followed instruction by instruction (ptrace), with one product and with two: what the second
took is counted. Joins benchmarks/results/kernels.json.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np

SHAPE, GROUP, PRODUCTS = (2048, 512), 128, 20


def main() -> None:
    """Count all bit-widths in both modes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=("avx512", "avx2", "portable"), default="avx2")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--compute", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.compute:
        bit_width, mode, products = options.compute
        compute(options.kernel, int(bit_width), mode, int(products))
        return
    from kernels import RESULTS, write

    count, few, many = (stepped, 1, 2) if options.kernel == "avx512" else (counted, 0, PRODUCTS)
    found = {
        mode: {
            str(b): (
                count(options.kernel, b, mode, many)
                - count(options.kernel, b if few else 1, mode if few else "int8", few)
            )
            / ((many - few) * SHAPE[0] * SHAPE[1])
            for b in range(1, 9)
        }
        for mode in ("int8", "float")
    }
    print(found)
    folder = options.out or RESULTS
    path = folder / "kernels.json"
    results = json.loads(path.read_text()) if path.exists() else {"pieces": {}}
    results.setdefault("instructions", {})[options.kernel] = found
    write(results, folder)


def counted(kernel: str, bit_width: int, mode: str, products: int) -> int:
    """Instructions of a process that computes ``products`` products."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    command += [__file__, "--kernel", kernel, "--compute", str(bit_width), mode, str(products)]
    environment = os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    match = re.search(r"Collected : (\d+)", done.stderr)
    assert match, done.stderr
    return int(match[1])


def stepped(kernel: str, bit_width: int, mode: str, products: int) -> int:
    """Instructions of a child between the two stops that :func:`compute` makes."""
    libc = ctypes.CDLL(None, use_errno=True)
    trace_me, step = 0, 9
    child = os.fork()
    if child == 0:
        libc.ptrace(trace_me, 0, None, None)
        compute(kernel, bit_width, mode, products, stop=True)
        os._exit(0)
    os.waitpid(child, 0)  # the first stop
    count = 0
    while True:
        assert libc.ptrace(step, child, None, None) == 0, os.strerror(ctypes.get_errno())
        _, status = os.waitpid(child, 0)
        if os.WSTOPSIG(status) == signal.SIGSTOP:
            break
        count += 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return count


def compute(kernel: str, bit_width: int, mode: str, products: int, *, stop: bool = False) -> None:
    """What is counted; ``stop`` before the products and after them."""
    from plyweight.kernels import pick

    rng = np.random.default_rng(0)
    out, num_inputs = SHAPE
    matrix = pick(kernel).matrix(SHAPE, group_size=GROUP)
    for _ in range(8):
        matrix.add_plane(rng.integers(0, 256, out * num_inputs // 8).astype(np.uint8))
    scale = matrix.ready_scale(np.ones((out, num_inputs // GROUP), np.float32))
    x = np.ones((1, num_inputs), np.float32)
    if stop:
        matrix.product(x, scale, bit_width, mode=mode)  # what only a first one does
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(products):
        matrix.product(x, scale, bit_width, mode=mode)
    if stop:
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main()
