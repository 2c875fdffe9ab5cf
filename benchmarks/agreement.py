"""Does the engine answer as torch does?

    python benchmarks/agreement.py --data FOLDER runs/resnet8/resnet8.layered.safetensors
    python benchmarks/agreement.py --data FOLDER FILE --images 2000

FILE is an artifact that examples/cifar10.py has trained. It is loaded, packed again with its graph
(512 training images calibrate the ranges that nobody has learned), and opened by the engine; torch
and engine then classify the same held-out images at every bit-width. In percent: how many get the
same class from both, and the accuracy of each.

Beside what plyweight.pack does with the operands of additions and the inputs of poolings (see
plyweight/graph/ranges.py) stands what else it could do: see GRIDS. A minute of CPU for a ResNet-8.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import numpy as np
import onnx
import torch
from cifar10_data import Cifar10
from cifar10_nets import NETS
from torch import nn

import plyweight
from plyweight.artifact import Graph, publish_atomically
from plyweight.graph import build, ranges

GRIDS = {
    "packed": "as packed",
    "whole": "the whole range",
    "fractions": "its fraction of least squares",
    "float": "none, so in float",
}
BATCH_SIZE, NUM_EXAMPLES = 250, 4

Answers = Mapping[int, np.ndarray]  # classes (n,) by bit-width
Images = Sequence[torch.Tensor]  # batches


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer in torch and by the engine, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="trained by examples/cifar10.py")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--net", choices=list(NETS), default="resnet8")
    parser.add_argument("--images", type=int, default=10_000, help="how many held-out images")
    parser.add_argument("--grids", choices=list(GRIDS), nargs="+", default=list(GRIDS))
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = Cifar10.load(options.data)
    batches = data.test_batches(BATCH_SIZE)[: max(options.images // BATCH_SIZE, 1)]
    images, labels = [x for x, _ in batches], torch.cat([y for _, y in batches]).numpy()
    examples = [data.batch(i, 128, seed=0, is_augmented=False)[0] for i in range(NUM_EXAMPLES)]
    model = plyweight.load(options.artifact, NETS[options.net](10), form="fake-quantized")
    of_torch, found = answers_of_torch(model, images), {}
    for name in options.grids:
        with grids_of(name):
            found[name] = answers_of_engine(model, examples, images)
    rows = [
        {
            "bit_width": b,
            "torch": percent(of_torch[b] == labels),
            "agreement": {name: percent(found[name][b] == of_torch[b]) for name in found},
            "engine": {name: percent(found[name][b] == labels) for name in found},
        }
        for b in sorted(of_torch, reverse=True)
    ]
    write(options.net, rows, len(labels), options.out)


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


def answers_of_engine(model: nn.Module, examples: Images, images: Images) -> Answers:
    """What the packed model says, at each bit-width of its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.layered.safetensors"
        plyweight.pack(model, path, example_inputs=examples)
        found = {}
        with plyweight.open(path, threads=1) as engine:
            (port,), (output,) = engine.inputs, engine.outputs
            for bit_width in engine.bit_widths:
                engine.set_bit_width(bit_width)
                logits = [engine.run({port.name: x.numpy()})[output.name] for x in images]
                found[bit_width] = np.concatenate(logits).argmax(1)
        return found


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


def write(net: str, rows: list[dict[str, Any]], num_images: int, out: Path) -> None:
    """The tables, on the screen and in a file."""
    names = list(rows[0]["agreement"])
    lines = [f"# {net} on CIFAR-10: the engine's answers against torch's\n"]
    lines += [f"{num_images:,} held-out images, in %.\n"]
    lines += [
        "| bits | same class | accuracy, engine | accuracy, torch | difference |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        engine, of_torch = row["engine"][names[0]], row["torch"]
        figures = f"{row['agreement'][names[0]]:.2f} | {engine:.2f} | {of_torch:.2f}"
        lines += [f"| {row['bit_width']} | {figures} | {engine - of_torch:+.2f} |"]
    lines += ["\nSame class, where the grids that nobody has learned are others:\n"]
    lines += ["|".join(["| bits ", *(f" {GRIDS[name]} " for name in names), ""])]
    lines += ["|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row['agreement'][name]:.2f}" for name in names]
        lines += [f"| {row['bit_width']} | {' | '.join(cells)} |"]
    conditions = {
        "command": f"python benchmarks/agreement.py --data FOLDER --net {net} FILE",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": {name: version(name) for name in ("plyweight", "torch", "onnxruntime")},
        "date": time.strftime("%Y-%m-%d"),
        "num_images": num_images,
    }
    lines += [
        f"\n`{conditions['command']}` · {conditions['machine']} · torch {version('torch')} · "
        f"onnxruntime {version('onnxruntime')} · {conditions['date']}\n"
    ]
    print("\n".join(lines))
    content = json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    for ending, text in (("md", "\n".join(lines)), ("json", content)):
        with publish_atomically(out / f"agreement-{net}.{ending}") as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
