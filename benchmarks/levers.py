"""Which levers of once-QAT earn their place? One change at a time, on a small budget.

    python benchmarks/levers.py --data ../shared/data/cifar10 --weights float.safetensors
    python benchmarks/levers.py ... --only mean mgda --seeds 0      # a part of it, in one process
    python benchmarks/levers.py --report                            # the table of what there is

ResNet-8, five epochs of once-QAT on 12,800 CIFAR-10 training images from one float network (that of
`examples/cifar10.py --net resnet8 --method float`), widths 8, 6, 4, 3, 2, activations as wide as
the weights, first and last module at 8 bits, bfloat16 autocast in training, batch norms measured
again at the end; accuracy in float32 on 10,000 images that were not trained on. Each variant
differs from "mean", which is plain training from the grids of `prepare`, in the one thing its name
says, the recipes in what they say; "example" is the recipe of examples/cifar10.py, and what is
called "example-..." is that without one of its levers. Differences in brackets are to "mean", of
the latter to "example", paired by seed. A run is kept as soon as it is over, and not repeated.
What a step costs: benchmarks/training.py.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import torch
import torch.nn.functional as F
from cifar10_checkpoints import digest_of
from cifar10_data import Cifar10
from cifar10_nets import FIRST_AND_LAST, NETS
from lever_variants import BIT_WIDTHS, VARIANTS, Variant
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import plyweight
from plyweight.artifact import publish_atomically
from plyweight.nn import at_bit_width
from plyweight.quantizers import WeightQuantizer
from plyweight.train import RateByBitWidth, damping_penalty, moment_penalty, parameter_groups

NUM_TRAIN, EPOCHS, BATCH_SIZE = 12_800, 5, 128
WEIGHT_DECAY = 1e-4
CALIBRATION_BATCHES = 10
EMA_DECAY = 0.99


@dataclass(frozen=True)
class Result:
    """Accuracies in percent by bit-width.

    Attributes:
        accuracy: after the batch norms were measured again.
        running: with the running statistics of training; of the default alone.
        averaged: of the exponential moving average of the weights; likewise.
        step_s: median seconds of a step here; benchmarks/training.py compares steps fairly.
        conditions: what has to be the same for runs to be compared.
    """

    variant: str
    seed: int
    accuracy: dict[int, float]
    running: dict[int, float]
    averaged: dict[int, float]
    step_s: float
    float_accuracy: float
    conditions: dict[str, str | int]


def main() -> None:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="float ResNet-8, .safetensors")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/levers"), help="kept runs")
    parser.add_argument("--report", action="store_true", help="only the table")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        if arguments.data is None or arguments.weights is None:
            parser.error("--data and --weights are needed to run anything")
        torch.set_num_threads(arguments.threads)
        data = Cifar10.load(arguments.data, num_train=NUM_TRAIN)
        net = NETS["resnet8"](10)
        net.load_state_dict(load_file(arguments.weights))
        for name in arguments.only:
            for seed in arguments.seeds:
                path = arguments.runs / f"{name}-{seed}.json"
                if not path.exists():
                    torch.compiler.reset()  # or the graphs of earlier variants count as its own
                    result = run(name, seed, net, data)
                    with publish_atomically(path) as file:
                        file.write(json.dumps(asdict(result)).encode())
                    print(f"{name}, seed {seed}: {result.accuracy}", file=sys.stderr, flush=True)
    write_report(arguments.runs)


def run(name: str, seed: int, float_net: nn.Module, data: Cifar10) -> Result:
    """Train one variant and measure it."""
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    float_net = float_net.eval()
    pinned = dict.fromkeys(FIRST_AND_LAST, 8)
    model = plyweight.prepare(float_net, BIT_WIDTHS, pinned=pinned, batch_norm=variant.batch_norm)
    if variant.is_calibrated:
        plyweight.calibrate(
            model,
            [data.batch(i, BATCH_SIZE, seed=seed) for i in range(4)],
            weights=variant.clip_weights,
        )
    model.train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    if not variant.learns_gains:
        for module in model.modules():
            if isinstance(module, WeightQuantizer):
                module.gain.requires_grad_(False)
    compiled = torch.compile(model)
    objective = plyweight.JointObjective(
        compiled,
        F.cross_entropy,
        teacher=float_net if variant.has_teacher else None,
        **variant.options,
    )
    optimizer = torch.optim.SGD(
        model.parameters()
        if variant.decays_all
        else parameter_groups(model, weight_decay=WEIGHT_DECAY),
        lr=variant.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    if variant.rates:
        own = {b: 1 / weight for b, weight in objective.weights.items()}
        RateByBitWidth(optimizer, model, own if variant.rates == "inverse" else variant.rates)
    num_steps = EPOCHS * data.steps_per_epoch(BATCH_SIZE)
    seconds = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = variant.learning_rate * rate(step, num_steps)
        images, labels = data.batch(step, BATCH_SIZE, seed=seed)
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            objective.backward(images, labels)
        for penalty in penalties(variant, model, step / num_steps):
            penalty.backward()
        if variant.clip_value:
            nn.utils.clip_grad_value_(model.parameters(), variant.clip_value)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        averaged.update_parameters(model)
    calibration = [data.batch(i, 256, seed=seed + 1000) for i in range(CALIBRATION_BATCHES)]
    running: dict[int, float] = {}
    of_average: dict[int, float] = {}
    if name == "mean":
        running = accuracies(model, compiled, data)
        take_buffers(averaged.module, model)
        plyweight.recalibrate(averaged.module, calibration)
        of_average = accuracies(averaged.module, averaged.module, data)
    plyweight.recalibrate(model, calibration)
    return Result(
        variant=name,
        seed=seed,
        accuracy=accuracies(model, compiled, data),
        running=running,
        averaged=of_average,
        step_s=statistics.median(seconds),
        float_accuracy=accuracy(float_net, data),
        conditions={
            "float_weights": digest_of(float_net),
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
        },
    )


def rate(step: int, num_steps: int) -> float:
    """A warm-up over the first twentieth, then a cosine to 0."""
    warmup = num_steps // 20
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def penalties(variant: Variant, model: nn.Module, progress: float) -> list[Tensor]:
    """The terms about the latent weights alone."""
    terms = []
    if variant.moments:
        terms.append(variant.moments * moment_penalty(model))
    if variant.damping and progress > 0.8:
        terms.append(variant.damping * damping_penalty(model, bit_width=2))
    return terms


def take_buffers(model: nn.Module, other: nn.Module) -> None:
    """The average of the weights was copied before the first batch chose kinds of activations."""
    state = model.state_dict()
    buffers = {name: buffer for name, buffer in other.named_buffers() if name in state}
    model.load_state_dict({**state, **copy.deepcopy(buffers)})


@torch.no_grad()
def accuracies(model: nn.Module, run: Callable, data: Cifar10) -> dict[int, float]:
    """Percent right on the test images at every bit-width; leaves the model in its mode.

    Args:
        model: the layered model.
        run: the same, compiled or not.
        data: with the test images.
    """
    was_training = model.training
    model.eval()
    found = {}
    for bit_width in BIT_WIDTHS:
        with at_bit_width(model, bit_width):
            found[bit_width] = accuracy(run, data)
    model.train(was_training)
    return found


@torch.no_grad()
def accuracy(net: Callable, data: Cifar10) -> float:
    """Percent right on the test images."""
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data.test_batches())
    return 100 * right / len(data.test_labels)


def write_report(runs: Path) -> None:
    """Print the table, and write it beside the figures it is made of."""
    kept = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    by_variant: dict[str, list[Result]] = {}
    for name in VARIANTS:
        found = [with_integer_widths(Result(**entry)) for entry in kept if entry["variant"] == name]
        if found:
            by_variant[name] = found
    distinct = {json.dumps(entry.get("conditions"), sort_keys=True) for entry in kept}
    if len(distinct) > 1:
        sys.exit(f"{runs} has runs of different conditions: {'; '.join(sorted(distinct))}.")
    if "mean" not in by_variant:
        sys.exit(f"{runs} has no run of 'mean', which all others are compared with.")
    table = as_markdown(by_variant)
    print(table)
    conditions = {
        "command": "python benchmarks/levers.py --data FOLDER --weights float.safetensors",
        "weights": "of python examples/cifar10.py --net resnet8 --method float --compile default",
        "budget": f"{NUM_TRAIN} images, {EPOCHS} epochs, batch {BATCH_SIZE}, ResNet-8",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        **(by_variant["mean"][0].conditions or {}),
        "versions": {n: version(n) for n in ("plyweight", "torch", "torchjd")},
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = [asdict(result) for results in by_variant.values() for result in results]
    page = (
        f"# Levers of once-QAT, one at a time\n\n{table}\n\n`{conditions['command']}`, with the "
        f"weights of `{conditions['weights'].removeprefix('of ')}` · {conditions['machine']} · "
        f"torch {version('torch')} · {conditions['date']} · details in levers.json\n"
    )
    content = json.dumps({"conditions": conditions, "runs": rows}, indent=1) + "\n"
    for name, text in (("levers.md", page), ("levers.json", content)):
        with publish_atomically(ROOT / "results" / name) as file:
            file.write(text.encode())


def with_integer_widths(result: Result) -> Result:
    """JSON keeps keys as text."""
    names = ("accuracy", "running", "averaged")
    return replace(result, **{n: {int(b): a for b, a in getattr(result, n).items()} for n in names})


def as_markdown(by_variant: dict[str, list[Result]]) -> str:
    """Mean accuracies; differences to the base of each are paired by seed, with their range."""
    widths = sorted(BIT_WIDTHS, reverse=True)
    lines = [
        f"Float network: {by_variant['mean'][0].float_accuracy:.2f} %.",
        "",
        "| variant | what changes | seeds | "
        + " | ".join(f"{b} bits" for b in widths)
        + " | mean difference (smallest, largest of the seeds) |",
        "|---|---|---|" + "---|" * (len(widths) + 1),
    ]
    rows = [(name, VARIANTS[name].question, "accuracy", r) for name, r in by_variant.items()]
    rows.append(("running statistics", "not measured again", "running", by_variant["mean"]))
    ema = f"EMA of the weights ({EMA_DECAY})"
    rows.append(("average", ema, "averaged", by_variant["mean"]))
    for name, question, what, results in rows:
        base = VARIANTS[name].base if name in VARIANTS else "mean"
        to = {result.seed: result.accuracy for result in by_variant.get(base, [])}
        # By bit-width, the difference of each seed that both have.
        deltas = {
            b: [getattr(r, what)[b] - to[r.seed][b] for r in results if r.seed in to]
            for b in widths
        }
        means = [statistics.mean(getattr(r, what)[b] for r in results) for b in widths]
        is_base = results is by_variant.get(base) and what == "accuracy"
        cells = [
            f"{mean:.2f}{'' if is_base else signed(deltas[b])}"
            for b, mean in zip(widths, means, strict=True)
        ]
        per_seed = [statistics.mean(of_seed) for of_seed in zip(*deltas.values(), strict=True)]
        overall = "-"
        if per_seed:
            low, high = min(per_seed), max(per_seed)
            overall = f"{statistics.mean(per_seed):+.2f} ({low:+.2f}, {high:+.2f})"
        lines.append(f"| {name} | {question} | {len(results)} | {' | '.join(cells)} | {overall} |")
    return "\n".join(lines)


def signed(deltas: list[float]) -> str:
    """The mean difference in brackets."""
    return f" ({statistics.mean(deltas):+.2f})" if deltas else ""


if __name__ == "__main__":
    main()
