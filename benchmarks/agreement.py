"""Does the engine answer as torch does?

    python benchmarks/agreement.py --data FOLDER runs/resnet8/resnet8.layered.safetensors
    python benchmarks/agreement.py --data FOLDER FILE --images 2000

FILE is an artifact that examples/cifar10.py has trained. It is loaded, packed again with its graph
(512 training images calibrate the ranges that nobody has learned), and opened by the engine; torch
and engine then classify the same held-out images at every bit-width. In percent: how many get the
same class from both, and the accuracy of each.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import numpy as np
import torch
from cifar10_data import Cifar10
from cifar10_nets import NETS
from torch import Tensor, nn

import plyweight
from plyweight.artifact import publish_atomically
from plyweight.engine import Engine

CALIBRATION_BATCHES, BATCH_SIZE = 4, 128


def main() -> None:
    """Compare at every bit-width, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="trained by examples/cifar10.py")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--net", choices=list(NETS), default="resnet8")
    parser.add_argument("--images", type=int, help="how many held-out images; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    arguments = parser.parse_args()
    data = Cifar10.load(arguments.data)
    model = plyweight.load(arguments.artifact, NETS[arguments.net](10), form="fake-quantized")
    model.eval()
    batches = []
    for images, labels in data.test_batches():
        batches.append((images, labels))
        if arguments.images and sum(len(of) for _, of in batches) >= arguments.images:
            break
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "with-graph")
        examples = [
            data.batch(step, BATCH_SIZE, seed=0, is_augmented=False)
            for step in range(CALIBRATION_BATCHES)
        ]
        plyweight.pack(model, path, example_inputs=examples)
        with plyweight.open(path) as engine:
            rows = [compared(model, engine, b, batches) for b in reversed(engine.bit_widths)]
    num_images = sum(len(labels) for _, labels in batches)
    write(arguments.net, rows, num_images, arguments.out)


@torch.no_grad()
def compared(
    model: nn.Module, engine: Engine, bit_width: int, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """One bit-width, in percent."""
    (port,), (output,) = engine.inputs, engine.outputs
    engine.set_bit_width(bit_width)
    of_torch, of_engine, right = [], [], []
    with plyweight.at_bit_width(model, bit_width):
        for images, labels in batches:
            of_torch.append(model(images).argmax(1).numpy())
            logits = engine.run({port.name: images.numpy()})[output.name]
            of_engine.append(logits.argmax(1))
            right.append(labels.numpy())
    first, second, labels_ = map(np.concatenate, (of_torch, of_engine, right))
    return {
        "bit_width": bit_width,
        "agreement": 100 * float((first == second).mean()),
        "engine": 100 * float((second == labels_).mean()),
        "torch": 100 * float((first == labels_).mean()),
    }


def write(net: str, rows: list[dict[str, float]], num_images: int, out: Path) -> None:
    """The table, on the screen and in a file."""
    lines = [
        f"# {net} on CIFAR-10: the engine's answers against torch's",
        "",
        f"{num_images:,} held-out images, in %.",
        "",
        "| bits | same class | accuracy, engine | accuracy, torch | difference |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['bit_width']} | {row['agreement']:.2f} | {row['engine']:.2f} | {row['torch']:.2f} "
        f"| {row['engine'] - row['torch']:+.2f} |"
        for row in rows
    ]
    conditions = {
        "command": f"python benchmarks/agreement.py --data FOLDER --net {net} FILE",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("plyweight", "torch", "onnxruntime")},
        "date": time.strftime("%Y-%m-%d"),
        "num_images": num_images,
    }
    lines += [
        "",
        f"`{conditions['command']}` · {conditions['machine']} · torch {version('torch')} · "
        f"onnxruntime {version('onnxruntime')} · {conditions['date']}",
        "",
    ]
    print("\n".join(lines))
    content = json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"
    for ending, text in (("md", "\n".join(lines)), ("json", content)):
        with publish_atomically(out / f"agreement-{net}.{ending}") as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
