"""The recipes of the CIFAR-10 example: every number that decides what is trained, in one place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["BALANCES", "QuantizedRecipe", "Recipe", "for_bit_widths", "recipes_for"]

BALANCES = ("mean", "mgda", "upgrad")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, a warm-up, then a cosine to 0.

    Attributes:
        epochs: passes over the training images.
        learning_rate: at the end of the warm-up, for batches of ``batch_size``.
        weight_decay: of weights; scales, norms and biases have none.
        batch_size: images in a step, of all processes together.
        momentum: of SGD.
        warmup_epochs: in which the learning rate rises linearly; may be a fraction.
        clip_value: the largest magnitude of an entry of a gradient; None for any.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int = 128
    momentum: float = 0.9
    warmup_epochs: float = 1.0
    clip_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizedRecipe(Recipe):
    """What once-QAT has beside that; a dedicated model is the same recipe with one bit-width.

    Attributes:
        start: the grids that training starts from: as ``prepare`` sets them, or "calibrated", where
            every bit-width is good already.
        clip_weights: how much each bit-width counts in the clips of calibrated grids; None for all
            alike. Training moves them little, and the codes of 2 bits need clips of their own far
            more than those of 8 do. Bit-widths that are not named count 1, here and below.
        activations: how wide they are, "match" for as wide as the weights.
        balance: of the gradients of the bit-widths.
        sampling: which bit-widths a step visits: all, or by the sandwich rule.
        num_random: how many between the ends the sandwich rule visits.
        width_weights: how much each bit-width's loss counts; None for all alike.
        teacher: what the widest learns from beside the labels: "float", the network that training
            starts from, or "none".
        teacher_of: "all" if all bit-widths learn from it, and none from the next wider one.
        moment_weight: of the penalty on the skewness and kurtosis of weights.
        damping_weight: of the penalty on weights that oscillate between two codes of the narrowest
            bit-width.
        damping_from: the share of the steps after which that penalty begins.
        scale_rate: the learning rate of scales, as a multiple of ``learning_rate``.
        rates: the learning rate of what a bit-width has of its own, likewise; None for 1 each,
            "inverse" for the inverse of its part in the loss: it then learns as fast as in a
            dedicated model.
        ema_decay: of an exponential moving average of the weights, which is then what is packed;
            None for the weights themselves.
        recalibration_batches: how many batches re-estimate the statistics of batch norms.
        calibration_batches: how many choose the grids where they are calibrated.
    """

    start: Literal["prepared", "calibrated"] = "prepared"
    clip_weights: Mapping[int, float] | None = None
    activations: Literal["match"] | int = "match"
    balance: Literal["mean", "mgda", "upgrad"] = "mean"
    sampling: Literal["all", "sandwich"] = "all"
    num_random: int = 1
    width_weights: Mapping[int, float] | None = None
    teacher: Literal["none", "float"] = "none"
    teacher_of: Literal["widest", "all"] = "widest"
    moment_weight: float = 0.0
    damping_weight: float = 0.0
    damping_from: float = 0.8
    scale_rate: float = 1.0
    rates: Mapping[int, float] | Literal["inverse"] | None = None
    ema_decay: float | None = None
    recalibration_batches: int = 100
    calibration_batches: int = 16


FLOAT = Recipe(epochs=100, learning_rate=0.1, weight_decay=5e-4)
QUANTIZED = QuantizedRecipe(
    epochs=100,
    learning_rate=0.04,
    weight_decay=1e-4,
    start="calibrated",
    clip_weights={2: 8.0, 3: 2.0},
    sampling="sandwich",  # as good as all bit-widths in every step, and cheaper
    # 8, 6 and 4 bits pull the weights alike, and together far more than 2 bits can.
    width_weights={2: 4.0, 3: 1.5},
    rates="inverse",
    teacher="float",
    teacher_of="all",
)
# Small enough to be trained on two cores, where nobody waits for 100 epochs.
EPOCHS = {"resnet8": (30, 15)}


def for_bit_widths(
    values: Mapping[int, float] | None, bit_widths: Iterable[int]
) -> dict[int, float] | None:
    """``values`` of exactly those bit-widths, 1 where none is named; None if there are none."""
    return None if values is None else {b: values.get(b, 1.0) for b in bit_widths}


def recipes_for(net: str) -> tuple[Recipe, QuantizedRecipe]:
    """The float and the once-QAT recipe of the network of that name."""
    float_epochs, quantized_epochs = EPOCHS.get(net, (FLOAT.epochs, QUANTIZED.epochs))
    return replace(FLOAT, epochs=float_epochs), replace(QUANTIZED, epochs=quantized_epochs)
