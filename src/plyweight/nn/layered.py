"""Layered modules: float modules whose weight is fake-quantized at the chosen bit-width.

A float module *becomes* layered (its class changes and two submodules are added), so whatever
refers to it, shares it or hooks it still does. ``layered.weight`` is the weight at the current
bit-width: code that reads it instead of calling the module (torchvision's Swin, tied heads)
computes with the right values, as with ``torch.nn.utils.parametrize``. The latent float weight,
which training updates, is the parameter of that name, ``layered.latent_weight``.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.nn.quantized import (
    BiasByBitWidth,
    InputQuantizer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLinear,
)
from plyweight.quantizers import ActivationQuantizer, Switchable, WeightQuantizer

__all__ = [
    "LayeredConv1d",
    "LayeredConv2d",
    "LayeredEmbedding",
    "LayeredLinear",
    "LayeredModule",
    "transpose_to_linear",
]


class LayeredModule(BiasByBitWidth):
    """What layered modules share.

    Attributes:
        weight_quantizer: quantizes the latent weight.
        input_quantizer: quantizes the input; ``nn.Identity`` where activations stay float.
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer | None = None,
    ) -> Self:
        """Turn ``module``, an exact instance of the float class, into a layered one in place."""
        module.__class__ = cls
        assert isinstance(module, cls)
        module.weight_quantizer = weight_quantizer
        module.input_quantizer = input_quantizer or nn.Identity()
        return module

    @property
    def latent_weight(self) -> nn.Parameter:
        """The float weight that training updates, ``(out, in, ...)``."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def _weight(self) -> Tensor:
        """The weight at the current bit-width, in the latent weight's shape and dtype."""
        try:
            values: Tensor = self.weight_quantizer(self.latent_weight)
        except AttributeError as error:
            # Let through, nn.Module would answer with the parameter of that name: the latent one.
            raise RuntimeError(f"the weight cannot be quantized: {error}") from error
        return values

    weight: Tensor = property(_weight)  # type: ignore[assignment]  # torch declares an attribute

    def switch_of_bias(self) -> Switchable:
        """The weight, which knows the current bit-width."""
        return self.weight_quantizer

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A checkpoint of a calibrated model has rows, so the bias becomes another parameter (and so
        # does the quantizer's gain): make optimizer and DistributedDataParallel after loading it.
        theirs, bias = state_dict.get(f"{prefix}bias"), self._parameters.get("bias")
        if isinstance(theirs, Tensor) and bias is not None:
            num_rows = len(self.switch_of_bias().model_bit_widths)
            if theirs.shape == (num_rows, bias.shape[-1]):  # others are refused by torch
                self.give_bias_rows()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LayeredLinear(LayeredModule, QuantizedLinear):
    """``nn.Linear`` with a layered weight ``(out, in)``."""


class LayeredConv1d(LayeredModule, QuantizedConv1d):
    """``nn.Conv1d`` with a layered weight ``(out, in / groups, length)``."""


class LayeredConv2d(LayeredModule, QuantizedConv2d):
    """``nn.Conv2d`` with a layered weight ``(out, in / groups, height, width)``."""


class LayeredEmbedding(LayeredModule, nn.Embedding):
    """``nn.Embedding`` with a layered weight ``(num_embeddings, dim)``."""

    def forward(self, ids: Tensor) -> Tensor:
        """``(...)`` int to ``(..., dim)``. Only the rows asked for are quantized."""
        flat = ids.reshape(-1)
        rows = F.embedding(
            flat,
            self.latent_weight,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        values: Tensor = self.weight_quantizer(rows, flat)
        if self.padding_idx is not None:  # never trained, so its scale is not either
            values = torch.where((flat == self.padding_idx)[:, None], values.detach(), values)
        return values.reshape(*ids.shape, self.embedding_dim)


def transpose_to_linear(module: Any, weight: nn.Parameter) -> nn.Linear:
    """Turn transformers' ``Conv1D``, whose weight is ``(in, out)``, into ``nn.Linear`` in place.

    Args:
        module: the ``Conv1D``.
        weight: its weight transposed, ``(out, in)``.
    """
    module.__class__ = nn.Linear
    module.out_features, module.in_features = weight.shape
    module.weight = weight
    assert isinstance(module, nn.Linear)
    return module
