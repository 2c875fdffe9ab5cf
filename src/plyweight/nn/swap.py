"""prepare: a layered copy of any model.

Modules of exactly the known float classes become layered; everything else (recurrent modules,
transposed convolutions, unknown subclasses, whose ``forward`` may do anything) stays float and is
named with its reason by :func:`plyweight.report`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from plyweight.codec import MAX_BIT_WIDTH
from plyweight.errors import LayeringError, listed
from plyweight.nn.attention import UnfusedAttention, disable_fast_paths, why_not_unfused
from plyweight.nn.layered import (
    LayeredConv1d,
    LayeredConv2d,
    LayeredEmbedding,
    LayeredLinear,
    LayeredModule,
    transpose_to_linear,
)
from plyweight.nn.norm import SHARED, SwitchableBatchNorm1d, SwitchableBatchNorm2d
from plyweight.nn.packed import (
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
)
from plyweight.quantizers import (
    ActivationQuantizer,
    ActivationWidths,
    Switchable,
    WeightQuantizer,
    checked_bit_widths,
)
from plyweight.quantizers.activation import activation_widths

__all__ = ["BATCH_NORMS", "LAYERED", "PACKED", "prepare", "unfuse", "unwrapped"]

LAYERED: dict[type[nn.Module], type[LayeredModule]] = {
    nn.Linear: LayeredLinear,
    nn.Conv1d: LayeredConv1d,
    nn.Conv2d: LayeredConv2d,
    nn.Embedding: LayeredEmbedding,
}
PACKED: dict[type[nn.Module], type[PackedModule]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}
BATCH_NORMS: dict[type[nn.Module], type[SwitchableBatchNorm1d | SwitchableBatchNorm2d]] = {
    nn.BatchNorm1d: SwitchableBatchNorm1d,
    nn.BatchNorm2d: SwitchableBatchNorm2d,
}
# By name, so that transformers need not be installed.
TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"


@torch.inference_mode(False)  # what is made inside could not be trained outside
def prepare(
    model: nn.Module,
    bit_widths: Sequence[int],
    *,
    activations: ActivationWidths | None = "match",
    group_size: int | None = None,
    pinned: Mapping[str, int] | None = None,
    exclude: Iterable[str] = (),
    batch_norm: Literal["private", "shared"] = "private",
) -> nn.Module:
    """A copy of ``model`` that computes at every one of ``bit_widths``, ready to train.

    ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Embedding``, the projections of
    ``nn.MultiheadAttention`` and transformers' ``Conv1D`` become layered, ``nn.BatchNorm1d/2d``
    switchable. Shared modules and tied weights stay shared. Device and dtype are kept; the copy
    starts at the widest bit-width. See :func:`plyweight.report` for what stayed float.

    Args:
        model: any module; it is not changed.
        bit_widths: ascending integers of 1 to 8, for example ``(2, 3, 4, 8)``.
        activations: the width of the inputs of layered modules. "match": as wide as the weights.
            An integer: that width always. A mapping: from weight bit-width to activation width.
            None: activations stay float.
        group_size: inputs that share a scale; None for one scale per output channel.
        pinned: ``{name: bit_width}``: this module, or everything in it, never goes below; "" is
            the model.
        exclude: names of modules that stay float, with everything in them.
        batch_norm: "private": statistics and affine parameters per bit-width. "shared": one for
            all, and gains per output channel that give the quantized weights of a channel the
            second moment of its latent ones. At n bit-widths, and without groups, that is 4n + 16
            bytes a channel instead of 16n: half at four.

    Raises:
        LayeringError: If an option is wrong or contradicts the model, a weight is not finite, or
            nothing can be layered.
    """
    if not isinstance(model, nn.Module):
        raise LayeringError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    bit_widths = checked_bit_widths(bit_widths)
    pinned = {} if pinned is None else pinned
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        exclude = (exclude,)
    exclude = tuple(exclude)
    _check_options(model, bit_widths, activations, group_size, pinned, exclude)
    if batch_norm not in ("private", "shared"):
        raise LayeringError(f"batch_norm is {batch_norm!r}; give 'private' or 'shared'.")
    if any(isinstance(module, Switchable) for module in model.modules()):
        raise LayeringError("the model is layered already; prepare the float model instead.")
    layered = copy.deepcopy(model)
    for module in layered.modules():
        vars(module).pop("kept_float", None)  # what a part of another layered model remembers
    for name, module in layered.named_modules(remove_duplicate=False):  # by any of its names
        if _covers(exclude, name):
            _keep_float(module, "excluded by the caller")
    kept = {name for name, module in layered.named_modules() if hasattr(module, "kept_float")}
    unfuse(layered, lambda name: name not in kept)
    disable_fast_paths(layered)
    chosen = _choose(layered)
    if not chosen:
        raise LayeringError(
            f"nothing in this {type(model).__name__} can be layered: it has no nn.Linear, Conv1d, "
            "Conv2d, Embedding or MultiheadAttention outside of what is excluded."
        )
    floors = _floors(layered, chosen, pinned)
    weight_quantizers: dict[int, WeightQuantizer] = {}  # by parameter: tied weights share theirs
    for name, module in chosen:
        weight: nn.Parameter = module.weight
        _check_finite(f"{name}.weight".lstrip("."), weight)
        floor = floors[id(weight)]
        if id(weight) not in weight_quantizers:
            weight_quantizers[id(weight)] = WeightQuantizer(
                weight, bit_widths, group_size=group_size, pinned=floor
            )
            if batch_norm == "shared":
                weight_quantizers[id(weight)].match_moments(weight)
        inputs = None
        if activations is not None and not isinstance(module, nn.Embedding):
            inputs = ActivationQuantizer(
                activations, bit_widths, pinned=floor, device=weight.device
            )
        LAYERED[type(module)].from_float(module, weight_quantizers[id(weight)], inputs)
    for module in list(layered.modules()):
        if type(module) in BATCH_NORMS and not hasattr(module, "kept_float"):
            if batch_norm == "shared":
                _keep_float(module, SHARED)
            else:
                BATCH_NORMS[type(module)].from_float(module, bit_widths)
    return layered


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of torch.compile and data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unfuse(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Give ``model`` linear modules where it computes with bare weights, in place.

    Args:
        model: its attention modules and transposed linear modules are changed.
        wanted: whether the module of a name is to be changed.
    """
    transposed: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if not wanted(name):
            continue
        if type(module) is nn.MultiheadAttention:
            reason = why_not_unfused(module)
            if reason:
                _keep_float(module, reason)
                _keep_float(module.out_proj, reason)
            else:
                UnfusedAttention.from_float(module)
        elif _qualified_name(module) == TRANSPOSED_LINEAR:
            weight: Any = module.weight
            if id(weight) not in transposed:
                transposed[id(weight)] = nn.Parameter(
                    weight.detach().t().contiguous(), requires_grad=weight.requires_grad
                )
            transpose_to_linear(module, transposed[id(weight)])


def _choose(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules to layer, with their names; marks the others that hold parameters."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append((name, module))
    chosen = []
    for name, module in model.named_modules():
        reason = getattr(module, "kept_float", None) or _why_not(module)
        if reason is None:
            others = [n for n, m in users[id(module.weight)] if _why_not(m) is not None]
            if others:
                reason = f"shares its weight with {others[0]}, which stays float"
        if reason is None:
            chosen.append((name, module))
        elif type(module) not in BATCH_NORMS or hasattr(module, "kept_float"):
            _keep_float(module, reason)
    return chosen


def _why_not(module: nn.Module) -> str | None:
    """The reason why ``module`` cannot be layered, or None."""
    kept: str | None = getattr(module, "kept_float", None)
    if kept:
        return kept
    weight = module._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        return "its weight is not initialized yet"
    if is_parametrized(module):
        return "its weight is computed by a parametrization"
    if type(module) not in LAYERED:
        known = next((known for known in LAYERED if isinstance(module, known)), None)
        if known:
            return f"a subclass of {known.__name__}, whose forward may differ"
        return "not a kind of module that can be layered"
    if "forward" in vars(module):
        return "its forward was replaced, and may not use the module's own"
    if weight is None:
        return "its weight is computed by a hook"
    if weight.numel() == 0:
        return "its weight is empty"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm rewrites its weight in every forward pass"
    return None


def _keep_float(module: nn.Module, reason: str) -> None:
    if module._parameters or module._buffers:  # also a batch norm whose are all None
        module.kept_float = reason  # type: ignore[assignment]


def _floors(
    model: nn.Module, chosen: list[tuple[str, Any]], pinned: Mapping[str, int]
) -> dict[int, int]:
    """The pinned bit-width of every weight, by parameter: the largest among those who share it.

    Raises:
        LayeringError: If a name in ``pinned`` has no weight of its own or inside.
    """
    weights = {module: module.weight for _, module in chosen}
    floors = {id(weight): 0 for weight in weights.values()}
    unused = set(pinned)
    for name, module in model.named_modules(remove_duplicate=False):  # by any of its names
        for outer in pinned:
            if module in weights and _covers((outer,), name):
                key = id(weights[module])
                floors[key] = max(floors[key], pinned[outer])
                unused.discard(outer)
    if unused:
        raise LayeringError(
            f"pinned names {min(unused)!r}, but no layered module has that name or is inside of "
            f"it; there are {listed(name for name, _ in chosen)}."
        )
    return floors


def _covers(names: Iterable[str], name: str) -> bool:
    """Whether ``name`` is one of ``names`` or inside of one; "" is the model itself."""
    return any(outer in ("", name) or name.startswith(f"{outer}.") for outer in names)


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_options(
    model: nn.Module,
    bit_widths: Sequence[int],
    activations: ActivationWidths | None,
    group_size: int | None,
    pinned: Mapping[str, int],
    exclude: tuple[str, ...],
) -> None:
    if activations is not None and not isinstance(activations, Mapping):
        activation_widths(activations, bit_widths)
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise LayeringError(f"group_size is {group_size!r}; give a positive integer or None.")
    if not isinstance(pinned, Mapping):
        raise LayeringError(f"pinned is {pinned!r}; give a mapping such as {{'fc': 8}}.")
    for name, bit_width in pinned.items():
        if type(bit_width) is not int or not 1 <= bit_width <= MAX_BIT_WIDTH:
            raise LayeringError(f"pinned[{name!r}] is {bit_width!r}; give an integer of 1 to 8.")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in exclude:
        if name not in names:
            raise LayeringError(
                f"exclude names {name!r}, but the model's modules are {listed(_inner(names))}."
            )


def _inner(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name)


def _check_finite(name: str, weight: nn.Parameter) -> None:
    if weight.is_meta:
        raise LayeringError(f"{name} is on the meta device; give the model its values first.")
    num_bad = int((~weight.detach().isfinite()).sum())
    if num_bad:
        raise LayeringError(
            f"{name} has {num_bad} weights that are NaN or infinite; train or load it again "
            "before it is layered."
        )
