"""What does a step of once-QAT cost, in time and in memory?

    python benchmarks/training.py                        # ResNet-8, CPU, compiled; a few minutes
    python benchmarks/training.py --net resnet20 --device cuda --batch-size 512

Variants: the float network; a dedicated model of each bit-width; once-QAT over all of them with
every balance, and with the sandwich rule. A step is forward passes, backward passes, balance and
optimizer. Time: all variants in one process, one step of each in turn, medians. A once-QAT step is
compared with the forward and backward passes of the dedicated models of the bit-widths it visits
(the sandwich rule's random one counts as the mean of those between), and with the float step.
Memory: each variant in a process of its own, the peak over three steps beyond what the process held
before it had a model.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import torch
import torch.nn.functional as F
from cifar10_nets import FIRST_AND_LAST, NETS
from results_files import write_results

import plyweight
from plyweight.train import parameter_groups

BIT_WIDTHS = (2, 3, 4, 6, 8)
ONCE_QAT = {
    "once-QAT, mean": {},
    "once-QAT, MGDA": {"balance": "mgda"},
    "once-QAT, UPGrad": {"balance": "upgrad"},
    "once-QAT, sandwich": {"sampling": "sandwich"},
    "once-QAT, sandwich, MGDA": {"sampling": "sandwich", "balance": "mgda"},
}
DEDICATED = {f"dedicated, {b} bits": b for b in reversed(BIT_WIDTHS)}
VARIANTS = ("float", *DEDICATED, *ONCE_QAT)

Step = Callable[[], tuple[float, float]]


def main() -> None:
    """Measure and write the table, or be the process that measures the memory of one variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, default="resnet8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(peak_bytes(options)))
        return
    memory = {name: memory_in_own_process(name) for name in VARIANTS}
    seconds = step_seconds(options)
    rows = summarized(seconds, memory, stored_gradient_bytes(options.net))
    table = as_markdown(rows)
    print(table)
    write(options, table, rows)


def step_of(name: str, options: argparse.Namespace) -> Step:
    """One training step of a variant; it returns seconds of its passes and of the whole step."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    net = NETS[options.net](10).to(device)
    images = torch.randn(options.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (options.batch_size,), device=device)
    if name != "float":
        widths = (DEDICATED[name],) if name in DEDICATED else BIT_WIDTHS
        net = plyweight.prepare(net, widths, pinned=dict.fromkeys(FIRST_AND_LAST, 8))
    net.train()
    compiled = net if options.eager else torch.compile(net)
    if name == "float":

        def backward() -> object:
            return F.cross_entropy(compiled(images), labels).backward()
    elif name in DEDICATED:
        net(images)  # activation steps start from a first batch

        def backward() -> object:  # without JointObjective, whose own work counts as once-QAT's
            return F.cross_entropy(compiled(images), labels).backward()
    else:
        objective = plyweight.JointObjective(compiled, F.cross_entropy, **ONCE_QAT.get(name, {}))

        def backward() -> object:
            return objective.backward(images, labels)

    groups = parameter_groups(net, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True)

    def step() -> tuple[float, float]:
        started = now(device)
        backward()
        passed = now(device)
        optimizer.step()
        optimizer.zero_grad()
        return passed - started, now(device) - started

    return step


def now(device: torch.device) -> float:
    """Seconds, after what the device still had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_seconds(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Seconds of passes and of the step, for each variant and round."""
    # Every variant is a graph of the same forward function; by default eight are too many.
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.accumulated_recompile_limit = 1000
    steps = {name: step_of(name, options) for name in VARIANTS}
    for name, step in steps.items():
        for _ in range(3):
            step()
        print(f"{name}: warm", file=sys.stderr, flush=True)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, step in steps.items():
            found[name].append(step())
    return found


def memory_in_own_process(name: str) -> int:
    """Peak bytes of one variant."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout))


def peak_bytes(options: argparse.Namespace) -> int:
    """The peak of three steps beyond what the process has with torch imported and no model."""
    name, on_gpu = options.memory_of, options.device.startswith("cuda")
    before = 0
    if not on_gpu:
        options.eager = True  # on a CPU, compiler and graph share the process: measured in eager
        # What torch and the solvers load when they are first used is no memory of a step.
        for warm in ("once-QAT, MGDA", "once-QAT, UPGrad"):
            step_of(warm, argparse.Namespace(**(vars(options) | {"batch_size": 2})))()
        gc.collect()
        before = resident_bytes("VmRSS")
    step = step_of(name, options)
    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM") - before


def resident_bytes(what: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}; memory is measured on Linux.")


def stored_gradient_bytes(net: str) -> int:
    """Of one bit-width: what a balance keeps of each."""
    model = plyweight.prepare(NETS[net](10), BIT_WIDTHS)
    return 4 * sum(p.numel() for p in model.parameters())


def summarized(
    seconds: dict[str, list[tuple[float, float]]], memory: dict[str, int], gradient_bytes: int
) -> list[dict]:
    """A row for each variant."""
    passes = {n: statistics.median(p for p, _ in found) for n, found in seconds.items()}
    steps = {n: statistics.median(s for _, s in found) for n, found in seconds.items()}
    by_width = {b: passes[name] for name, b in DEDICATED.items()}
    ends = by_width[BIT_WIDTHS[0]] + by_width[BIT_WIDTHS[-1]]
    between = statistics.mean(by_width[b] for b in BIT_WIDTHS[1:-1])
    five_steps = sum(steps[name] for name in DEDICATED)
    widest = memory[f"dedicated, {BIT_WIDTHS[-1]} bits"]
    rows = []
    for name in VARIANTS:
        row = {
            "variant": name,
            "step_ms": 1000 * steps[name],
            "passes_ms": 1000 * passes[name],
            "range_ms": [1000 * f(s for _, s in seconds[name]) for f in (min, max)],
            "of_float_step": steps[name] / steps["float"],
            "peak_bytes": memory[name],
        }
        if name in ONCE_QAT:
            is_sandwich = "sandwich" in name
            contained = ends + between if is_sandwich else sum(by_width.values())
            # One gradient is what any training keeps.
            num_stored = (2 if is_sandwich else 4) if "balance" in ONCE_QAT[name] else 0
            row |= {
                "of_contained_passes": steps[name] / contained,
                "of_five_dedicated_steps": steps[name] / five_steps,
                "stored_gradient_bytes": num_stored * gradient_bytes,
                "peak_of_dedicated": (memory[name] - num_stored * gradient_bytes) / widest,
            }
        rows.append(row)
    return rows


def as_markdown(rows: list[dict]) -> str:
    """The table."""
    lines = [
        "| variant | step | of the float step | of the passes it contains | of five dedicated "
        "steps | peak memory | without stored gradients, of the 8-bit dedicated |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["range_ms"]
        ratios = [
            f"{row[key]:.2f}" if key in row else "-"
            for key in ("of_contained_passes", "of_five_dedicated_steps")
        ]
        peak = f"{row['peak_of_dedicated']:.2f}" if "peak_of_dedicated" in row else "-"
        lines.append(
            f"| {row['variant']} | {row['step_ms']:.0f} ms ({low:.0f} - {high:.0f}) "
            f"| {row['of_float_step']:.2f} | {ratios[0]} | {ratios[1]} "
            f"| {row['peak_bytes'] / 1e6:.0f} MB | {peak} |"
        )
    return "\n".join(lines)


def write(options: argparse.Namespace, table: str, rows: list[dict]) -> None:
    """Table and figures, with their conditions, to benchmarks/results/."""
    where = "CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    conditions = {
        "command": " ".join(["python benchmarks/training.py", *sys.argv[1:]]),
        "net": options.net,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "compiled": not options.eager,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {where}, "
        f"{options.threads} thread(s)",
        "versions": {n: version(n) for n in ("plyweight", "torch", "torchjd")},
        "date": time.strftime("%Y-%m-%d"),
    }
    name = f"training-{options.net}" + ("" if options.device == "cpu" else "-gpu")
    page = (
        f"# A training step: {options.net}, batch {options.batch_size}\n\n{table}\n\n"
        f"`{conditions['command']}` · {conditions['machine']} · torch {version('torch')} · "
        f"{conditions['date']} · time {'eager' if options.eager else 'compiled'}, memory "
        f"{'eager' if options.device == 'cpu' else 'as timed'}; median (smallest - largest) of "
        f"{options.rounds}\n"
    )
    write_results(ROOT / "results", name, page, {"conditions": conditions, "rows": rows})


if __name__ == "__main__":
    main()
