"""What benchmarks/levers.py compares: the levers of once-QAT, one change at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cifar10_recipe import QUANTIZED, for_bit_widths

BIT_WIDTHS = (2, 3, 4, 6, 8)
LEARNING_RATE = 0.04


@dataclass(frozen=True)
class Variant:
    """One change to its ``base``; ``options`` go to ``JointObjective``."""

    question: str
    options: dict = field(default_factory=dict)
    base: str = "mean"
    has_teacher: bool = False
    decays_all: bool = False
    batch_norm: str = "private"
    is_calibrated: bool = False
    clip_weights: Mapping[int, float] | None = None
    learning_rate: float = LEARNING_RATE
    learns_gains: bool = True
    moments: float = 0.0
    damping: float = 0.0
    rates: Mapping[int, float] | Literal["inverse"] | None = None
    clip_value: float | None = None


WEIGHTS = for_bit_widths(QUANTIZED.width_weights, BIT_WIDTHS)
EXAMPLE = Variant(
    "calibrated start, clips and losses weighted, own rows at inverse rates, float teacher of all",
    {"weights": WEIGHTS, "teacher_of": "all"},
    has_teacher=True,
    is_calibrated=True,
    clip_weights=for_bit_widths(QUANTIZED.clip_weights, BIT_WIDTHS),
    rates="inverse",
)


def example_with(question: str, **changes: Any) -> Variant:
    """The recipe of the example but for one lever."""
    return replace(EXAMPLE, question=question, base="example", **changes)


def recipe(question: str, options: dict | None = None, **changes: Any) -> Variant:
    """From calibrated grids, with a float teacher."""
    return Variant(question, options or {}, has_teacher=True, is_calibrated=True, **changes)


VARIANTS = {
    "mean": Variant("plain mean over the bit-widths, distillation, from prepare's grids"),
    "weighted": Variant(
        "weights 1 / 1.5 / 2 for >= 4 / 3 / 2 bits",
        {"weights": {8: 1.0, 6: 1.0, 4: 1.0, 3: 1.5, 2: 2.0}},
    ),
    "mgda": Variant("MGDA on normalized gradients", {"balance": "mgda"}),
    "upgrad": Variant("UPGrad", {"balance": "upgrad"}),
    "labels": Variant("no distillation", {"distillation": None}),
    "teacher": Variant("a float teacher for the widest", has_teacher=True),
    "calibrated": Variant("training starts from plyweight.calibrate", is_calibrated=True),
    "recipe": recipe("calibrated start, float teacher, learning rate 0.01", learning_rate=0.01),
    "recipe-0.02": recipe(
        "calibrated start, float teacher, learning rate 0.02", learning_rate=0.02
    ),
    "recipe-0.04": recipe("calibrated start, float teacher, learning rate 0.04"),
    "recipe-rows": recipe(
        "the same, own rows of every width at 5 times the rate",
        rates=dict.fromkeys(BIT_WIDTHS, 5.0),
    ),
    "recipe-sandwich": recipe("the same by the sandwich rule", {"sampling": "sandwich"}),
    "recipe-direct": recipe(
        "the same, the float network teaches every width", {"teacher_of": "all"}
    ),
    "recipe-weighted": recipe(
        "the same, weights 1 / 1.5 / 2 for >= 4 / 3 / 2 bits",
        {"weights": {8: 1.0, 6: 1.0, 4: 1.0, 3: 1.5, 2: 2.0}},
    ),
    "recipe-0.08": recipe(
        "calibrated start, float teacher, learning rate 0.08", learning_rate=0.08
    ),
    "example": EXAMPLE,
    "example-start": example_with("from the grids of prepare", is_calibrated=False),
    "example-clips": example_with("clips that serve all bit-widths alike", clip_weights=None),
    "example-weights": example_with(
        "losses of all bit-widths alike", options={"teacher_of": "all"}
    ),
    "example-rates": example_with("own rows at the rate of the weights", rates=None),
    "example-chain": example_with(
        "each bit-width learns from the next wider one, the widest from float",
        options={"weights": WEIGHTS},
    ),
    "example-sandwich": example_with(
        "by the sandwich rule", options=EXAMPLE.options | {"sampling": "sandwich"}
    ),
    "sandwich": Variant("widest, narrowest, one between", {"sampling": "sandwich"}),
    "gains": Variant("gains as they start, not learned", learns_gains=False),
    "decay": Variant("weight decay on scales, norms and biases too", decays_all=True),
    "shared": Variant("one batch norm for all, moment-matched gains", batch_norm="shared"),
    "moments": Variant("kurtosis to 1.8, skewness to 0 (x 0.01)", moments=0.01),
    "damping": Variant("oscillation damping at 2 bits (x 0.1), last fifth", damping=0.1),
    "rates": Variant("own rows of 3 and 2 bits at 0.5 and 0.25", rates={3: 0.5, 2: 0.25}),
    "clipping": Variant("gradient values clipped at 1", clip_value=1.0),
}
