"""How many instructions does a weight cost on the CPU?

    python benchmarks/kernels_counted.py --kernel avx2      needs valgrind; three minutes

Callgrind counts those of a process that computes 20 products of one row with a weight of
2048 x 512 in groups of 128, less those of one that computes none. What is left, over products and
weights, holds all that a call costs. Valgrind (3.19) knows no AVX-512, so that variant is not
counted. Joins benchmarks/results/kernels.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np

SHAPE, GROUP, PRODUCTS = (2048, 512), 128, 20


def main() -> None:
    """Count all bit-widths in both modes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=("avx2", "portable"), default="avx2")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--compute", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.compute:
        bit_width, mode, products = options.compute
        compute(options.kernel, int(bit_width), mode, int(products))
        return
    from kernels import RESULTS, write

    none = counted(options.kernel, 1, "int8", 0)
    found = {
        mode: {
            str(b): (counted(options.kernel, b, mode, PRODUCTS) - none)
            / (PRODUCTS * SHAPE[0] * SHAPE[1])
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


def compute(kernel: str, bit_width: int, mode: str, products: int) -> None:
    """What is counted."""
    from plyweight.kernels import pick

    rng = np.random.default_rng(0)
    out, num_inputs = SHAPE
    matrix = pick(kernel).matrix(SHAPE, group_size=GROUP)
    for _ in range(8):
        matrix.add_plane(rng.integers(0, 256, out * num_inputs // 8).astype(np.uint8))
    scale = np.ones((out, num_inputs // GROUP), np.float32)
    x = np.ones((1, num_inputs), np.float32)
    for _ in range(products):
        matrix.product(x, scale, bit_width, mode=mode)


if __name__ == "__main__":
    main()
