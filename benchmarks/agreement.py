"""Does the engine answer as torch does?

    python benchmarks/agreement.py --data FOLDER --net resnet8 resnet8.layered.safetensors
    python benchmarks/agreement.py --data FOLDER --net resnet20 --calibrate resnet20.safetensors
    python benchmarks/agreement.py --net digits digits.layered.safetensors

FILE is an artifact that examples/cifar10.py or plyweight demo has trained, or with ``--calibrate``
the float weights of a network, which is calibrated first (8-bit activations). plyweight.fit_edges
then lets torch round what the graph rounds, on 512 training images; the model is packed with its
graph, and torch and engine classify the same images at every bit-width. The engine runs in a
process of its own, in which torch is not imported: with ``--python``, that of an environment that
does not even have it. In percent: how many get the same class from both, and the accuracies.

``--backend openvino`` asks that runtime, and its table has a name of its own.

With ``--grids`` also what agrees without fit_edges, where only the graph rounds the operands of
additions and the inputs of poolings: see GRIDS, and plyweight/graph/ranges.py.
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "examples")]

import numpy as np
import onnx
import torch
from cifar10_data import Cifar10
from cifar10_nets import NETS
from results_files import write_results
from safetensors.torch import load_file
from torch import nn

import plyweight
from plyweight.artifact import Graph
from plyweight.demo import Digits, DigitsNet
from plyweight.engine.backends import BACKENDS
from plyweight.graph import build, ranges

GRIDS = {
    "packed": "as packed",
    "whole": "the whole range",
    "fractions": "its fraction of least squares",
    "float": "none, so in float",
}
DEFAULT_BACKEND = "onnxruntime"
BATCH_SIZE, NUM_EXAMPLES = 250, 4
BIT_WIDTHS, ACTIVATION_WIDTH = (2, 3, 4, 5, 6, 8), 8  # as benchmarks/calibration.py has them

Answers = Mapping[int, np.ndarray]  # classes (n,) by bit-width
Images = Sequence[torch.Tensor]  # batches


@dataclass(frozen=True)
class Subject:
    """A network and the data it is asked about.

    Attributes:
        build: makes the float network.
        images: batches to classify.
        labels: ``(n,)`` of them.
        examples: batches of training data; calibrate and fit_edges take them.
        what: the images, in words.
    """

    build: Callable[[], nn.Module]
    images: Images
    labels: np.ndarray
    examples: Images
    what: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer in torch and by the engine, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="an artifact, or float weights to calibrate")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--net", choices=[*NETS, "digits"], default="resnet8")
    parser.add_argument("--calibrate", action="store_true", help="FILE has float weights")
    parser.add_argument("--images", type=int, default=10_000, help="how many")
    parser.add_argument("--grids", choices=list(GRIDS), nargs="*", default=[])
    parser.add_argument(
        "--backend", choices=list(BACKENDS), default=DEFAULT_BACKEND, help="of the engine"
    )
    parser.add_argument("--python", default=sys.executable, help="to run the engine with")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    subject = digits() if options.net == "digits" else pictures(options)
    model = calibrated(subject, options.file) if options.calibrate else loaded(subject, options)
    before, without = answers_of_torch(model, subject.images), {}
    for name in options.grids:
        with grids_of(name):
            without[name] = answers_of_engine(model, subject, options)
    report = plyweight.fit_edges(model, subject.examples)
    print(report, file=sys.stderr)
    of_torch = answers_of_torch(model, subject.images)
    of_engine = answers_of_engine(model, subject, options)
    rows = [
        {
            "bit_width": b,
            "agreement": percent(of_engine[b] == of_torch[b]),
            "engine": percent(of_engine[b] == subject.labels),
            "torch": percent(of_torch[b] == subject.labels),
            "torch_before": percent(before[b] == subject.labels),
            "agreement_before": {n: percent(found[b] == before[b]) for n, found in without.items()},
        }
        for b in sorted(of_torch, reverse=True)
    ]
    write(options, rows, subject)


def pictures(options: argparse.Namespace) -> Subject:
    """CIFAR-10's held-out images."""
    if options.data is None:
        sys.exit("--data is missing; give the folder of CIFAR-10.")
    data = Cifar10.load(options.data)
    batches = data.test_batches(BATCH_SIZE)[: max(options.images // BATCH_SIZE, 1)]
    return Subject(
        build=NETS[options.net],
        images=[images for images, _ in batches],
        labels=torch.cat([labels for _, labels in batches]).numpy(),
        examples=[data.batch(i, 128, seed=0, is_augmented=False)[0] for i in range(NUM_EXAMPLES)],
        what="CIFAR-10's last fifth of the training images",
    )


def digits() -> Subject:
    """Those that the demo tests on."""
    data = Digits.load()
    return Subject(
        build=DigitsNet,
        images=data.test_images.split(BATCH_SIZE),
        labels=data.test_labels.numpy(),
        examples=list(data.train_images.split(128)[:NUM_EXAMPLES]),
        what="scikit-learn's test digits of plyweight demo",
    )


def loaded(subject: Subject, options: argparse.Namespace) -> nn.Module:
    """The trained model of an artifact."""
    return plyweight.load(options.file, subject.build(), form="fake-quantized")


def calibrated(subject: Subject, weights: Path) -> nn.Module:
    """A layered model of float weights."""
    net = subject.build()
    # Such files have no num_batches_tracked, which no evaluation reads.
    net.load_state_dict(load_file(weights), strict=False)
    model = plyweight.prepare(net.eval(), BIT_WIDTHS, activations=ACTIVATION_WIDTH).eval()
    plyweight.calibrate(model, subject.examples)
    return model


def percent(is_true: np.ndarray) -> float:
    """The share of what is true, to a hundredth."""
    return round(100 * float(is_true.mean()), 2)


def answers_of_torch(model: nn.Module, images: Images) -> Answers:
    """What the layered model says at each of its bit-widths."""
    found = {}
    for bit_width in plyweight.bit_widths_of(model):
        with torch.no_grad(), plyweight.at_bit_width(model, bit_width):
            found[bit_width] = np.concatenate([model(x).argmax(1).numpy() for x in images])
    return found


def answers_of_engine(model: nn.Module, subject: Subject, options: argparse.Namespace) -> Answers:
    """What the packed model says, at each bit-width of its file, without torch."""
    with tempfile.TemporaryDirectory() as folder:
        path, inputs, answers = (Path(folder) / name for name in ("net", "x.npy", "answers.npz"))
        plyweight.pack(model, path, example_inputs=subject.examples)
        np.save(inputs, torch.cat(list(subject.images)).numpy())
        script = ROOT / "answers.py"
        command = [options.python, script, path, inputs, answers, options.backend]
        subprocess.run(command, check=True)
        with np.load(answers, allow_pickle=False) as found:
            return {int(bit_width): found[bit_width] for bit_width in found}


@contextlib.contextmanager
def grids_of(name: str) -> Iterator[None]:
    """Pack within this block with the grids of that name."""
    if name == "packed":
        yield
    elif name == "float":
        with mock.patch.object(build.Plan, "graph", without_grids):
            yield
    else:
        fractions = (1.0,) if name == "whole" else ranges.FRACTIONS

        def candidates(sample: ranges.Sample, _: object) -> list[ranges.Grid]:
            step = (sample.largest - sample.lowest) / (ranges.EDGE_LEVELS - 1)
            return [ranges._grid(np.float32(fraction * step), sample) for fraction in fractions]

        with mock.patch.object(ranges, "_candidates", candidates):
            yield


def without_grids(plan: build.Plan) -> Graph:
    """The graph that ranges are measured with, without the outputs it has for that."""
    graph, _ = plan.calibration()
    (whole,) = graph.models
    proto = onnx.load_from_string(whole.data)
    del proto.graph.output[len(graph.outputs) :]
    model = dataclasses.replace(whole, data=proto.SerializeToString(deterministic=True))
    return dataclasses.replace(graph, models=(model,))


def write(options: argparse.Namespace, rows: list[dict[str, Any]], subject: Subject) -> None:
    """The tables, on the screen and in a file."""
    net, num_images, backend = options.net, len(subject.labels), options.backend
    is_default = backend == DEFAULT_BACKEND
    engine = "the engine" if is_default else backend
    lines = [f"# {net}: {engine}'s answers against torch's\n"]
    lines += [f"{num_images:,} of {subject.what}, in %. The engine's process has no torch.\n"]
    lines += [
        "| bits | same class | accuracy, engine | accuracy, torch | torch before fit_edges |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        names = ("agreement", "engine", "torch", "torch_before")
        lines += [f"| {row['bit_width']} | {' | '.join(f'{row[name]:.2f}' for name in names)} |"]
    if options.grids:
        lines += ["\nSame class without fit_edges, where the grids that only the graph has are:\n"]
        lines += ["|".join(["| bits ", *(f" {GRIDS[name]} " for name in options.grids), ""])]
        lines += ["|---" * (len(options.grids) + 1) + "|"]
        for row in rows:
            cells = [f"{row['agreement_before'][name]:.2f}" for name in options.grids]
            lines += [f"| {row['bit_width']} | {' | '.join(cells)} |"]
    command = ["python benchmarks/agreement.py"] + ["--data FOLDER"] * (net != "digits")
    command += [f"--net {net}"] + ["--calibrate"] * options.calibrate + ["FILE"]
    command += [f"--backend {backend}"] * (not is_default)
    command += [f"--grids {' '.join(options.grids)}"] * bool(options.grids)
    conditions = {
        "command": " ".join(command),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": {name: version(name) for name in ("plyweight", "torch", backend)},
        "date": time.strftime("%Y-%m-%d"),
        "num_images": num_images,
    }
    lines += [
        f"\n`{conditions['command']}` · {conditions['machine']} · torch {version('torch')} · "
        f"{backend} {version(backend)} · {conditions['date']}\n"
    ]
    print("\n".join(lines))
    content = {"conditions": conditions, "rows": rows}
    name = f"agreement-{net}" if is_default else f"agreement-{net}-{backend}"
    write_results(options.out, name, "\n".join(lines), content)


if __name__ == "__main__":
    main()
