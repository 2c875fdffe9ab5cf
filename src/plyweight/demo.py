"""demo: the whole story on real handwritten digits, in a few minutes on a CPU.

    float net -> once-QAT for 1 to 8 bits at the same time -> one file -> loaded at every bit-width
    from just the bytes that bit-width needs; beside it, a dedicated model of each bit-width,
    trained by the same recipe from the same float net

The digits are scikit-learn's packaged copy of the UCI handwritten digits (1,797 images of 8 x 8
pixels); nothing is downloaded. The same seed makes the same file, byte for byte.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.artifact import MemorySource, Receipt, publish_atomically
from plyweight.engine import open as open_engine
from plyweight.loading import load
from plyweight.nn import at_bit_width, prepare
from plyweight.packing import fit_edges, pack
from plyweight.train import JointObjective, recalibrate

__all__ = [
    "FAST",
    "DemoResult",
    "Digits",
    "DigitsNet",
    "Progress",
    "Recipe",
    "WidthResult",
    "draw",
    "run_demo",
]

BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
# As wide as the weights, but at least 4 bits: one-bit inputs would be another experiment.
ACTIVATIONS = {b: max(b, 4) for b in BIT_WIDTHS}
TEST_SHARE = 0.3
NUM_EXAMPLES = 256  # training images that the graph's ranges are calibrated with


@dataclass(frozen=True)
class Recipe:
    """How long and how fast every network of the demo is trained."""

    float_epochs: int = 16
    quantized_epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 6e-3


FAST = Recipe(float_epochs=8, quantized_epochs=2)


class Progress(Protocol):
    """Where the demo says how far it is."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` epochs of ``what`` are over."""


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class WidthResult:
    """One row of the table.

    Attributes:
        bit_width: of the weights.
        activation_width: of the inputs of layered modules.
        num_bytes: to download: header and layers up to this bit-width.
        bits_per_weight: those, all included, per layered weight.
        accuracy: of the loaded model on the test images, 0 to 1.
        dedicated_accuracy: of a model trained for this bit-width alone.
        agrees: whether the loaded logits equal the trained model's bit for bit.
        engine_agreement: the share of test images for which the engine, which has no torch, gives
            the trained model's class; None if no graph was asked for.
    """

    bit_width: int
    activation_width: int
    num_bytes: int
    bits_per_weight: float
    accuracy: float
    dedicated_accuracy: float
    agrees: bool
    engine_agreement: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demo found out."""

    seed: int
    path: str
    float_accuracy: float
    num_test: int
    rows: tuple[WidthResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)


class DigitsNet(nn.Module):
    """Two convolutions and two linear modules for 8 x 8 digits; 55,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(512, 96, bias=False)
        self.bn3 = nn.BatchNorm1d(96)
        self.fc2 = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, 1, 8, 8)`` to logits ``(batch, 10)``."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.fc1(x.flatten(start_dim=1))))
        logits: Tensor = self.fc2(x)
        return logits


@dataclass(frozen=True)
class Digits:
    """The images ``(n, 1, 8, 8)`` in 0..1 and labels ``(n,)``, split once and for all."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> "Digits":
        """scikit-learn's digits, 70 % to train on and 30 % to test on, stratified by label."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(
            images, labels, test_size=TEST_SHARE, stratify=labels, random_state=0
        )
        train_images, test_images = (
            torch.tensor(p / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8) for p in parts[:2]
        )
        return cls(train_images, torch.tensor(parts[2]), test_images, torch.tensor(parts[3]))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, every image shifted by up to one pixel."""
        order = torch.randperm(len(self.train_images), generator=generator)
        for chosen in order.split(size):
            yield _shifted(self.train_images[chosen], generator), self.train_labels[chosen]


def run_demo(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    graph: bool = False,
) -> DemoResult:
    """Train, pack, load and compare; leaves ``digits.layered.safetensors`` in ``folder``.

    With ``graph`` the file has one, so that it runs without torch, and the engine's answers are
    compared as well; the model then rounds in torch what the graph rounds.

    Raises:
        OutputError: If the file cannot be written.
        ImportError: If a graph is asked for and the extra ``[onnx]`` is not installed.
    """
    # One thread, so that the file does not depend on how many cores there are; a net this small
    # is hardly slower, and far faster where others use the cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(folder, seed, recipe or Recipe(), progress or _silent, graph=graph)
    finally:
        torch.set_num_threads(threads)


def _run(
    folder: str | os.PathLike[str],
    seed: int,
    recipe: Recipe,
    progress: Progress,
    *,
    graph: bool,
) -> DemoResult:
    digits = Digits.load()
    torch.manual_seed(seed)
    float_net = _train_float(DigitsNet(), digits, recipe, seed, progress)
    path = Path(folder) / "digits.layered.safetensors"
    train = partial(_train_quantized, float_net, digits=digits, recipe=recipe, seed=seed)
    model = train(BIT_WIDTHS, report=partial(progress, "once-QAT"))
    examples = digits.train_images[:NUM_EXAMPLES] if graph else None
    if graph:
        fit_edges(model, examples)
    receipt = pack(model, path, example_inputs=examples)
    dedicated = {}
    for bit_width in BIT_WIDTHS:
        report = partial(progress, f"dedicated, {bit_width} bit{'s' * (bit_width > 1)}")
        dedicated[bit_width] = _accuracy(train((bit_width,), report=report), digits)
    rows = _measure(model, path, receipt, dedicated, digits, has_graph=graph)
    return DemoResult(seed, str(path), _accuracy(float_net, digits), len(digits.test_labels), rows)


def draw(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """The figure of the demo: accuracy against bytes to download, as PNG.

    Raises:
        OutputError: If the file cannot be written.
    """
    # The object-oriented interface: pyplot would pick a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kilobytes = [row.num_bytes / 1000 for row in result.rows]
    series = {
        "one file, this prefix of it": [100 * row.accuracy for row in result.rows],
        "a dedicated model of that width": [100 * row.dedicated_accuracy for row in result.rows],
    }
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(100 * result.float_accuracy, color="0.6", lw=1, label="float model")
    for (label, accuracies), style in zip(series.items(), ("o-", "s--"), strict=True):
        axes.plot(kilobytes, accuracies, style, label=label)
    labels = [f"{row.bit_width}\n{x:.0f}" for row, x in zip(result.rows, kilobytes, strict=True)]
    axes.set_xticks(kilobytes, labels)
    axes.set_xlabel("bit-width, and kB to download, header included")
    axes.set_ylabel(f"accuracy on {result.num_test} test digits (%)")
    axes.set_title("Every bit-width is a prefix of one file", loc="left")
    axes.legend(frameon=False, loc="lower right")
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with publish_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _measure(
    model: nn.Module,
    path: Path,
    receipt: Receipt,
    dedicated: dict[int, float],
    digits: Digits,
    *,
    has_graph: bool,
) -> tuple[WidthResult, ...]:
    """Load every bit-width from the bytes it needs, and no others."""
    rows = []
    data = path.read_bytes()
    images = digits.test_images
    for layer in receipt.layers:
        prefix = MemorySource(data[: layer.total_bytes], name=str(path))
        loaded = load(prefix, DigitsNet())
        with torch.no_grad(), at_bit_width(model, layer.bit_width):
            logits = model(images)
            agrees = torch.equal(loaded(images), logits)
        rows.append(
            WidthResult(
                bit_width=layer.bit_width,
                activation_width=ACTIVATIONS[layer.bit_width],
                num_bytes=layer.total_bytes,
                bits_per_weight=layer.bits_per_weight,
                accuracy=_accuracy(loaded, digits),
                dedicated_accuracy=dedicated[layer.bit_width],
                agrees=agrees,
                engine_agreement=_agreement(prefix, images, logits) if has_graph else None,
            )
        )
    return tuple(rows)


def _agreement(prefix: MemorySource, images: Tensor, logits: Tensor) -> float:
    """The share of images of which the engine, at the widest width, says what ``logits`` do."""
    with open_engine(prefix) as engine:
        (found,) = engine.run({engine.inputs[0].name: images.numpy()}).values()
    return float((torch.from_numpy(found).argmax(dim=1) == logits.argmax(dim=1)).float().mean())


def _train_float(
    net: nn.Module, digits: Digits, recipe: Recipe, seed: int, progress: Progress
) -> nn.Module:
    def backward(images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(net(images), labels).backward()

    report = partial(progress, "float")
    _train(net, backward, digits, recipe, recipe.float_epochs, seed, report)
    return net.eval()


def _train_quantized(
    float_net: nn.Module,
    bit_widths: tuple[int, ...],
    *,
    digits: Digits,
    recipe: Recipe,
    seed: int,
    report: Callable[[int, int], None],
) -> nn.Module:
    """Once-QAT from the float net; with one bit-width, the dedicated model of that width."""
    model = prepare(float_net, bit_widths, activations=ACTIVATIONS).train()
    objective = JointObjective(model, F.cross_entropy)

    def backward(images: Tensor, labels: Tensor) -> None:
        objective.backward(images, labels)

    _train(model, backward, digits, recipe, recipe.quantized_epochs, seed + 1, report)
    generator = torch.Generator().manual_seed(seed + 2)
    recalibrate(model, list(digits.batches(256, generator)))
    return model.eval()


def _train(
    net: nn.Module,
    backward: Callable[[Tensor, Tensor], None],
    digits: Digits,
    recipe: Recipe,
    epochs: int,
    seed: int,
    report: Callable[[int, int], None],
) -> None:
    """An ordinary loop: whose gradients they are is up to ``backward``."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    steps_per_epoch = -(-len(digits.train_labels) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=epochs * steps_per_epoch, pct_start=0.2
    )
    report(0, epochs)
    for epoch in range(epochs):
        for images, labels in digits.batches(recipe.batch_size, generator):
            backward(images, labels)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        report(epoch + 1, epochs)


@torch.no_grad()
def _accuracy(net: nn.Module, digits: Digits) -> float:
    right = net(digits.test_images).argmax(dim=1) == digits.test_labels
    return float(right.float().mean())


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, zeros moving in."""
    padded = F.pad(images, (1, 1, 1, 1))
    corner = torch.randint(0, 3, (len(images), 2), generator=generator)
    span = torch.arange(8)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span  # (n, 8) each
    index = torch.arange(len(images))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]][:, None]
