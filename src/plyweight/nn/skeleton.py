"""Skeleton: a copy of a model without its weights, whose tensors are found and set by name.

Loading fills it, so the float weights of the user's model are never copied, and the model may as
well have been built on the meta device.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plyweight.errors import LayeringError, ModelMismatchError, listed
from plyweight.nn.attention import disable_fast_paths
from plyweight.nn.norm import BATCH_COUNT
from plyweight.nn.swap import unfuse, unwrapped
from plyweight.quantizers import Switchable

__all__ = ["Skeleton", "Slot"]


@dataclass(frozen=True)
class Slot:
    """One place of a tensor: ``module.<leaf>``. Tied tensors have several."""

    module_name: str
    module: nn.Module
    leaf: str


class Skeleton:
    """A copy of a float model whose parameters have shapes but no values yet.

    Attributes:
        model: the copy.
        device: of the user's model, where loaded tensors go; the CPU for a model on meta.
    """

    def __init__(self, model: nn.Module, names: frozenset[str]) -> None:
        """Copy ``model``.

        Args:
            model: a float model; it is not changed.
            names: of the tensors that will be set; attention modules and transposed linear
                modules are unfused where they say so.
        """
        if isinstance(model, nn.Module):
            model = unwrapped(model)
        else:
            raise LayeringError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
        if any(isinstance(module, Switchable) for module in model.modules()):
            raise LayeringError("the model is layered already; give the float model instead.")
        devices = [p.device for p in model.parameters() if not p.is_meta]
        self.device = devices[0] if devices else torch.device("cpu")
        memo: dict[int, object] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        self.model = copy.deepcopy(model, memo)

        def wanted(name: str) -> bool:
            prefix = f"{name}." if name else ""
            return f"{prefix}weight" in names or f"{prefix}q_proj.weight" in names

        unfuse(self.model, wanted)
        disable_fast_paths(self.model)
        self._slots = self._find_slots()
        self._first = {
            f"{s.module_name}.{s.leaf}".lstrip("."): name
            for name, slots in self._slots.items()
            for s in slots
        }

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether tensors of these names and shapes are exactly what the model needs.

        Raises:
            ModelMismatchError: If they are not; it names those on both sides.
        """
        mine = {name: tuple(self.tensor(name).shape) for name in self._slots}
        taken: dict[str, str] = {}
        artifact_only = []
        for name, shape in shapes.items():
            first = self._first.get(name, "")
            if mine.get(first) != shape or taken.setdefault(first, name) != name:
                artifact_only.append(f"{name} {shape}")
        model_only = [f"{name} {shape}" for name, shape in mine.items() if name not in taken]
        if artifact_only or model_only:
            raise ModelMismatchError(artifact_only=artifact_only, model_only=model_only)

    def slots(self, name: str) -> tuple[Slot, ...]:
        """Every place where the tensor of this name stands."""
        return self._slots[self._first[name]]

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name as it is now."""
        slot = self.slots(name)[0]
        tensor: Tensor = getattr(slot.module, slot.leaf)
        return tensor

    def set(self, name: str, value: Tensor) -> None:
        """Give the tensor of this name its value, in the model's floating-point dtype.

        Raises:
            ModelMismatchError: If one is floating-point and the other is not.
        """
        old = self.tensor(name)
        if old.dtype != value.dtype and not (old.is_floating_point() and value.is_floating_point()):
            raise ModelMismatchError(
                artifact_only=[f"{name} as {value.dtype}"], model_only=[f"{name} as {old.dtype}"]
            )
        value = value.to(self.device, old.dtype)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        for slot in self.slots(name):
            setattr(slot.module, slot.leaf, value)

    def check_complete(self) -> None:
        """Raise LayeringError if a tensor has no value, which no artifact can give."""
        for module in self.model.modules():
            count = module._buffers.get(BATCH_COUNT)
            if count is not None and count.is_meta:
                module._buffers[BATCH_COUNT] = torch.zeros_like(count, device=self.device)
        empty = [n for n, t in self.model.named_buffers() if t.is_meta]
        if empty:
            raise LayeringError(
                f"{listed(empty)} is not part of a state dict, so it has no value on the meta "
                "device; build the model on a real device."
            )

    def _find_slots(self) -> dict[str, tuple[Slot, ...]]:
        """Slots by the first name of their tensor, in the order of the state dict."""
        by_tensor: dict[int, list[Slot]] = {}
        for module_name, module in self.model.named_modules():
            persistent = {
                leaf: tensor
                for leaf, tensor in module._buffers.items()
                if leaf not in module._non_persistent_buffers_set and leaf != BATCH_COUNT
            }
            for leaf, tensor in (*module._parameters.items(), *persistent.items()):
                if tensor is not None:
                    by_tensor.setdefault(id(tensor), []).append(Slot(module_name, module, leaf))
        return {
            f"{slots[0].module_name}.{slots[0].leaf}".lstrip("."): tuple(slots)
            for slots in by_tensor.values()
        }
