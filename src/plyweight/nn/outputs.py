"""Output quantizers: a module whose output is rounded by a quantizer that is a part of it.

A layered module rounds its input where it reads it. Where nobody does, before an addition or a
pooling, the module that computes the value rounds it: it gets a child ``output_quantizer``, and a
forward hook that lets the output through it. The module itself may be of any class.
"""

from typing import Any

from torch import Tensor, nn

from plyweight.errors import LayeringError
from plyweight.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["OUTPUT_QUANTIZER", "can_round", "output_quantizers", "round_output"]

OUTPUT_QUANTIZER = "output_quantizer"
# What has children that are called one after another, whatever they are; and quantizers themselves.
_NOT_ROUNDED = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    ActivationQuantizer,
    WeightQuantizer,
)


def can_round(module: nn.Module) -> bool:
    """Whether ``module`` can have an output quantizer, and has none yet."""
    return not isinstance(module, _NOT_ROUNDED) and not hasattr(module, OUTPUT_QUANTIZER)


def round_output(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Let ``quantizer`` round what ``module`` gives from now on, a tensor.

    Raises:
        LayeringError: If the module has something of that name already, or calls its children by
            itself, as nn.Sequential does.
    """
    if not can_round(module):
        raise LayeringError(
            f"the output of a {type(module).__name__} with children {list(module._modules)} "
            "cannot be rounded; round that of a module inside of it."
        )
    module.add_module(OUTPUT_QUANTIZER, quantizer)
    module.register_forward_hook(_round)


def output_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Those of ``model``, by the first name of each: ``<module>.output_quantizer``."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.split(".")[-1] == OUTPUT_QUANTIZER and isinstance(module, ActivationQuantizer)
    }


def _round(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise LayeringError(
            f"the output of a {type(module).__name__} is to be rounded, but it is no tensor of "
            "floats; the artifact is of another network."
        )
    rounded: Tensor = module.output_quantizer(output)  # type: ignore[operator]
    return rounded
