"""How good is every bit-width of a pretrained float network that is only calibrated?

    python benchmarks/calibration.py --data ../shared/data     # about ten minutes on one core

ResNet-20, 32, 44 and 56 for CIFAR-10 are calibrated on 512 training images through the training
augmentation, and scored on the official test images. SqueezeNet 1.1 is calibrated on one half of
100 pictures and scored on the other, both ways round: too few for an accuracy, enough to ask how
often its answer is that of the float network.

All bit-widths are those of one artifact, packed and loaded again; inputs are quantized to 8 bits.
Every comparison with float is picture by picture. Beside it stands what there is without
calibration: steps from the first batch, and batch norms measured again (`prepare`, `recalibrate`).
Markdown and JSON go to benchmarks/results/.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

from cifar10_data import Cifar10
from cifar10_nets import NETS
from squeezenet import SqueezeNet, read_pictures

import plyweight

RESULTS = ROOT / "results"
BIT_WIDTHS = (2, 3, 4, 5, 6, 8)
ACTIVATION_WIDTH = 8
RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56")
NUM_BATCHES, BATCH_SIZE = 4, 128
PICTURES_PER_BATCH = 10

Batches = Sequence[Tensor]


@dataclass(frozen=True)
class Row:
    """One network at one bit-width.

    Attributes:
        num_bytes: of the prefix that is needed: header and layers up to this bit-width.
        accuracy: of the loaded artifact, percent.
        difference: to float on the same pictures, in points.
        agreement: pictures whose answer is that of float, percent.
        uncalibrated: accuracy without calibration, percent.
        agrees_with_trained: whether loaded logits equal those of the calibrated model, bit for bit.
    """

    bit_width: int
    num_bytes: int
    accuracy: float
    difference: float
    agreement: float
    uncalibrated: float
    agrees_with_trained: bool


@dataclass(frozen=True)
class Result:
    """One network at every bit-width."""

    net: str
    num_pictures: int
    float_accuracy: float
    float_bytes: int
    calibration_s: float
    calibration_cpu_s: float  # of all threads: what it takes when nobody else uses the machine
    rows: tuple[Row, ...]


@dataclass
class Part:
    """What was seen on some of the test pictures: answers ``(n,)`` by bit-width."""

    num_bytes: dict[int, int]
    answers: dict[int, Tensor]
    uncalibrated: dict[int, Tensor]
    agrees: dict[int, bool]
    seconds: float
    cpu_seconds: float


def main() -> None:
    """Calibrate every network, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="weights/, cifar10/, ...")
    parser.add_argument("--nets", nargs="+", default=[*RESNETS, "squeezenet"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for name in arguments.nets:
        measure = measure_squeezenet if name == "squeezenet" else measure_resnet
        results.append(measure(name, arguments.data))
        print(
            f"{name}: calibrated in {results[-1].calibration_cpu_s:.0f} s of CPU", file=sys.stderr
        )
        write(results, arguments.threads, arguments.out)  # a long run that is cut short is not lost
    print(as_markdown(results))


def write(results: list[Result], threads: int, folder: Path) -> None:
    """The tables as Markdown, and everything as JSON."""
    conditions = {
        "command": f"python benchmarks/calibration.py --data FOLDER --threads {threads}",
        "bit_widths": BIT_WIDTHS,
        "activations": ACTIVATION_WIDTH,
        "cifar10": f"{NUM_BATCHES} batches of {BATCH_SIZE} augmented training images, seed 0",
        "squeezenet": "two halves of 100 pictures (every second one), calibrated on one and scored "
        f"on the other, both ways; batches of {PICTURES_PER_BATCH}",
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("plyweight", "torch", "numpy", "pillow")},
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(
        json.dumps({"conditions": conditions, "nets": [asdict(r) for r in results]}, indent=1)
        + "\n"
    )
    (folder / "calibration.md").write_text(
        f"# Calibrated without training: every bit-width of one file\n\n{as_markdown(results)}\n\n"
        f"`{conditions['command']}` · {conditions['machine']} · torch {version('torch')} · "
        f"{conditions['date']} · details in calibration.json\n"
    )


def measure_resnet(name: str, folder: Path) -> Result:
    """Calibrate on training images, score on the official test images."""
    data = Cifar10.load(folder / "cifar10")
    net = NETS[name]()
    # The file has no num_batches_tracked, which no evaluation reads.
    net.load_state_dict(load_file(folder / "weights" / f"cifar10_{name}.safetensors"), strict=False)
    batches = [data.batch(step, BATCH_SIZE, seed=0)[0] for step in range(NUM_BATCHES)]
    test = data.test_batches(250, official=True)
    pictures = [images for images, _ in test]
    part = measure(net.eval(), NETS[name], batches, pictures)
    return summarize(name, net, [part], [answers_of(net, pictures)], [data.official_labels])


def measure_squeezenet(name: str, folder: Path) -> Result:
    """Calibrate on one half of the pictures, score on the other, both ways round."""
    pictures, labels = read_pictures(folder / "imagenet_like100")
    net = SqueezeNet()
    weights = load_file(folder / "weights" / "squeezenet1_1_imagenet.safetensors")
    net.load_state_dict({key: value.float() for key, value in weights.items()})
    net.eval()
    halves = [(pictures[i::2].split(PICTURES_PER_BATCH), labels[i::2]) for i in (0, 1)]
    parts = [
        measure(net, SqueezeNet, seen, scored)
        for (seen, _), (scored, _) in (halves, reversed(halves))
    ]
    scored = [half for half, _ in reversed(halves)]
    answers = [answers_of(net, half) for half in scored]
    return summarize(name, net, parts, answers, [labels[1::2], labels[0::2]])


def measure(net: nn.Module, build: Callable[[], nn.Module], seen: Batches, scored: Batches) -> Part:
    """Calibrate ``net`` on some pictures, and answer others from the loaded artifact."""
    model = plyweight.prepare(net, BIT_WIDTHS, activations=ACTIVATION_WIDTH).eval()
    started, cpu_started = time.perf_counter(), time.process_time()
    plyweight.calibrate(model, seen)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    plain = plyweight.prepare(net, BIT_WIDTHS, activations=ACTIVATION_WIDTH).eval()
    answers_of(plain, seen[:1])
    plyweight.recalibrate(plain, seen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.layered.safetensors"
        receipt = plyweight.pack(model, path)
        loaded = plyweight.load(path, build())
    answers, uncalibrated, agrees = {}, {}, {}
    for bit_width in BIT_WIDTHS:
        for each in (model, plain, loaded):
            plyweight.set_bit_width(each, bit_width)
        answers[bit_width] = answers_of(loaded, scored)
        uncalibrated[bit_width] = answers_of(plain, scored)
        with torch.no_grad():
            agrees[bit_width] = torch.equal(loaded(scored[0]), model(scored[0]))
    num_bytes = {layer.bit_width: layer.total_bytes for layer in receipt.layers}
    return Part(num_bytes, answers, uncalibrated, agrees, seconds, cpu_seconds)


def summarize(
    name: str, net: nn.Module, parts: list[Part], of_float: list[Tensor], labels: list[Tensor]
) -> Result:
    """All parts of the test pictures together; the longest calibration, the largest file."""
    truth, expected = torch.cat(labels), torch.cat(of_float)
    float_accuracy = percent(expected == truth)
    rows = []
    for b in BIT_WIDTHS:
        answers = torch.cat([part.answers[b] for part in parts])
        plain = torch.cat([part.uncalibrated[b] for part in parts])
        rows.append(
            Row(
                bit_width=b,
                num_bytes=max(part.num_bytes[b] for part in parts),
                accuracy=percent(answers == truth),
                difference=round(percent(answers == truth) - float_accuracy, 2),
                agreement=percent(answers == expected),
                uncalibrated=percent(plain == truth),
                agrees_with_trained=all(part.agrees[b] for part in parts),
            )
        )
    return Result(
        net=name,
        num_pictures=len(truth),
        float_accuracy=float_accuracy,
        float_bytes=4 * sum(p.numel() for p in net.parameters()),
        calibration_s=round(max(part.seconds for part in parts), 1),
        calibration_cpu_s=round(max(part.cpu_seconds for part in parts), 1),
        rows=tuple(rows),
    )


@torch.no_grad()
def answers_of(net: nn.Module, batches: Batches) -> Tensor:
    """The class of the largest logit, int64 ``(n,)``."""
    return torch.cat([net(pictures).argmax(dim=1) for pictures in batches])


def percent(is_true: Tensor) -> float:
    """The share of what is true, to a hundredth."""
    return round(100 * float(is_true.double().mean()), 2)


def as_markdown(results: list[Result]) -> str:
    """One table of differences to float, and one with everything for each network."""
    header = "| net | float |" + "".join(f" {b} bits |" for b in reversed(BIT_WIDTHS))
    lines = [f"{header} CPU seconds |", "|---" * (len(BIT_WIDTHS) + 3) + "|"]
    for result in results:
        cells = [f"{row.accuracy:.1f} ({row.difference:+.1f})" for row in reversed(result.rows)]
        lines.append(
            f"| {result.net} | {result.float_accuracy:.1f} | "
            + " | ".join(cells)
            + f" | {result.calibration_cpu_s:.0f} |"
        )
    lines.append("\nAccuracy in % and the difference to float in points, picture by picture.")
    for result in results:
        lines += [
            f"\n## {result.net}: {result.num_pictures} pictures, float "
            f"{result.float_accuracy:.1f} %, {result.float_bytes / 1000:,.0f} kB\n",
            "| bit-width | download | accuracy | to float | same as float | not calibrated | "
            "loaded = calibrated |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.bit_width} | {row.num_bytes / 1000:,.0f} kB | {row.accuracy:.1f} % "
            f"| {row.difference:+.1f} | {row.agreement:.1f} % | {row.uncalibrated:.1f} % "
            f"| {row.agrees_with_trained} |"
            for row in result.rows
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
