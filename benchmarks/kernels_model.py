"""What a kernel means for a loaded model: memory, upgrades, switches, calls.

    python benchmarks/kernels_model.py      half a minute; joins benchmarks/results/kernels.json

Eight linear modules of 2048 x 2048, groups of 128, in one artifact of eight bit-widths. Each kernel
is measured in a process of its own. Memory is what Linux counts as resident, above that of the
process with its libraries before the model is loaded.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from kernels import RESULTS, conditions, write
from torch import nn
from turns import seconds, turn

import plyweight
from plyweight import native

SIDE, MODULES, BIT_WIDTHS = 2048, 8, tuple(range(1, 9))
CHOICES = (("reference", "float"), ("auto", "float"), ("auto", "int8"))


def main() -> None:
    """Measure all kernels, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.measure:
        path, kernel, mode = options.measure
        print(json.dumps(measured(path, kernel, mode)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        torch.manual_seed(0)
        net = plyweight.prepare(network(), BIT_WIDTHS, activations=None, group_size=128)
        plyweight.pack(net, path)
        del net
        for kernel, mode in CHOICES:
            if kernel == "auto" and native.missing_because() is not None:
                print(f"only the reference is measured: {native.missing_because()}")
                continue
            command = [sys.executable, __file__, "--measure", str(path), kernel, mode]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1])
    results = options.out / "kernels.json"
    found = json.loads(results.read_text()) if results.exists() else {"pieces": {}}
    found["model"] = {"rows": rows, "conditions": conditions(), "weights": MODULES * SIDE**2}
    write(found, options.out)


def network() -> nn.Module:
    """The float one."""
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(MODULES)))


def measured(path: str, kernel: str, mode: Any) -> dict[str, Any]:
    """One kernel: bytes and seconds."""
    with torch.device("meta"):
        empty = network()
    empty = empty.to_empty(device="cpu")
    plyweight.load(path, empty, bit_width=1, kernel=kernel, mode=mode)  # loads what loads late
    gc.collect()
    before = resident_bytes()
    net = plyweight.load(path, empty, bit_width=2, kernel=kernel, mode=mode)
    x = torch.randn(1, SIDE)
    with torch.inference_mode():
        net(x)
        gc.collect()
        found: dict[str, Any] = {"two_bits_bytes": resident_bytes() - before}
        started = time.perf_counter()
        found["longest_wait_s"] = longest_call(net, x, lambda: plyweight.upgrade(net, path))
        found["upgrade_s"] = time.perf_counter() - started
        gc.collect()
        found["eight_bits_bytes"] = resident_bytes() - before
        for bit_width in (2, 4, 8):
            plyweight.set_bit_width(net, bit_width)
            found[f"call_{bit_width}_s"] = statistics.median(turn(lambda: net(x)))
        switches = [
            seconds(lambda b=b: plyweight.set_bit_width(net, b)) for b in BIT_WIDTHS[::-1] * 30
        ]
        found["switch_s"] = statistics.median(switches) / MODULES
        started = time.perf_counter()
        plyweight.downgrade(net, 2)
        found["downgrade_s"] = time.perf_counter() - started
        gc.collect()
        found["downgraded_bytes"] = resident_bytes() - before
    weight = net[0].packed_weight
    return {"kernel": weight.kernel_name.split()[0], "mode": mode} | found


def longest_call(net: nn.Module, x: torch.Tensor, change: Callable[[], object]) -> float:
    """Seconds of the longest call of another thread while ``change`` happens."""
    done, longest = Event(), [0.0]

    def call() -> None:
        with torch.inference_mode():
            while not done.is_set():
                longest[0] = max(longest[0], seconds(lambda: net(x)))

    thread = Thread(target=call)
    thread.start()
    change()
    done.set()
    thread.join()
    return longest[0]


def resident_bytes() -> int:
    """Of this process, as Linux counts them."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
