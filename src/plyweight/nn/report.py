"""report: what of a model is layered, and what stays float and why."""

from dataclasses import dataclass
from math import prod

from torch import nn
from torch.nn.parameter import UninitializedParameter

from plyweight.nn.bit_width import bit_widths_of
from plyweight.nn.layered import LayeredModule
from plyweight.nn.norm import SwitchableBatchNorm1d, SwitchableBatchNorm2d
from plyweight.nn.packed import PackedModule, PackedWeight
from plyweight.nn.quantized import BiasByBitWidth
from plyweight.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["KeptModule", "Report", "report"]


@dataclass(frozen=True)
class KeptModule:
    """A module whose own parameters stay float."""

    name: str
    kind: str
    num_parameters: int
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`plyweight.prepare` did.

    Attributes:
        bit_widths: ascending.
        layered: names of the layered modules.
        num_layered: weights that are layered, each tied weight once.
        num_parameters: of the whole model before; quantizers are not counted.
        kept: the modules that stay float, each with the parameters not counted before.
    """

    bit_widths: tuple[int, ...]
    layered: tuple[str, ...]
    num_layered: int
    num_parameters: int
    kept: tuple[KeptModule, ...]

    @property
    def share(self) -> float:
        """Layered weights per parameter, 0 to 1."""
        return self.num_layered / self.num_parameters

    def __str__(self) -> str:
        """A line, then one for each module that stays float."""
        lines = [
            f"{self.share:.1%} of {self.num_parameters:,} parameters are layered "
            f"({len(self.layered)} modules; {', '.join(map(str, self.bit_widths))} bits)"
        ]
        lines += [
            f"  float: {kept.name or '(the model itself)'} ({kept.kind}, {kept.num_parameters:,} "
            f"parameters): {kept.reason}"
            for kept in self.kept
        ]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What of ``model``, which ``prepare`` or ``load`` returned, is layered.

    Raises:
        LayeringError: If ``model`` is not layered.
    """
    bit_widths = bit_widths_of(model)
    layered: list[str] = []
    kept: list[KeptModule] = []
    seen: set[int] = set()
    num_layered = num_parameters = 0
    for name, module in model.named_modules():
        if isinstance(module, (WeightQuantizer, ActivationQuantizer)):
            continue
        if isinstance(module, PackedWeight):
            num_layered += prod(module.shape)
            num_parameters += prod(module.shape)
            continue
        all_own = list(module.parameters(recurse=False))
        own = [p for p in all_own if id(p) not in seen]
        seen.update(map(id, own))
        num_own = sum(_size(p) for p in own)
        if isinstance(module, (SwitchableBatchNorm1d, SwitchableBatchNorm2d)):
            num_own //= len(module.model_bit_widths)  # it has a row for each
        elif isinstance(module, BiasByBitWidth) and module.has_bias_rows:
            num_own -= sum(_size(p) - p.shape[-1] for p in own if _is_bias_of(module, p))
        num_parameters += num_own
        if isinstance(module, LayeredModule):
            layered.append(name)
            num_layered += sum(p.numel() for p in own if p is module.latent_weight)
        elif isinstance(module, PackedModule):
            layered.append(name)
        elif all_own and hasattr(module, "kept_float"):
            kept.append(KeptModule(name, type(module).__name__, num_own, str(module.kept_float)))
    return Report(bit_widths, tuple(layered), num_layered, num_parameters, tuple(kept))


def _is_bias_of(module: nn.Module, parameter: nn.Parameter) -> bool:
    return parameter is module._parameters["bias"]


def _size(parameter: nn.Parameter) -> int:
    """The number of its elements; 0 for that of a lazy module before its first batch."""
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()
