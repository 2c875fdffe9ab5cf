"""Penalties: terms about the latent weights alone, added once a step rather than per bit-width.

    objective.backward(images, labels)
    (0.01 * damping_penalty(model, bit_width=2)).backward()
    optimizer.step()

Each is a scalar tensor with a gradient. None is on by default; docs/log.md has what they did.
"""

import torch
from torch import Tensor, nn

from plyweight.codec import codes_at, decode, encode
from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn.bit_width import bit_widths_of
from plyweight.nn.layered import LayeredModule

__all__ = ["UNIFORM_KURTOSIS", "damping_penalty", "moment_penalty"]

UNIFORM_KURTOSIS = 1.8  # of a uniform distribution, which a uniform grid suits at every bit-width


def moment_penalty(model: nn.Module, *, kurtosis: float = UNIFORM_KURTOSIS) -> Tensor:
    """How far the weights of each module are from a symmetric, flat distribution.

    The mean over modules of ``(kurtosis(w) - target)^2 + skewness(w)^2``. Shkolnik et al., "Robust
    Quantization: One Model to Rule Them All" (NeurIPS 2020); with skewness in Xu et al., "EQ-Net:
    Elastic Quantization Neural Networks" (ICCV 2023).

    Args:
        model: from :func:`plyweight.prepare`.
        kurtosis: the target; 3 is a Gaussian's, 1.8 a uniform distribution's.

    Raises:
        LayeringError: If nothing in ``model`` is layered.
    """
    terms = []
    for module in _layered(model):
        weight = module.latent_weight.float()
        centered = weight - weight.mean()
        # Clamped before the root, whose gradient at 0 is infinite: a weight may be all zeros.
        normalized = centered / centered.square().mean().clamp_min(1e-24).sqrt()
        skewness = normalized.pow(3).mean()
        terms.append((normalized.pow(4).mean() - kurtosis).square() + skewness.square())
    return torch.stack(terms).mean()


def damping_penalty(model: nn.Module, *, bit_width: int) -> Tensor:
    """Half the squared distance of each weight from the centre of its cell, in squared cells.

    Weights near the border of two cells change sides from step to step; this draws them to a
    centre. The mean over all weights; those beyond the clip count with their distance to it. Nagel
    et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022).

    Args:
        model: from :func:`plyweight.prepare`.
        bit_width: whose cells; narrow ones are where weights oscillate.

    Raises:
        BitWidthError: If ``model`` does not have that bit-width.
        LayeringError: If nothing in ``model`` is layered.
    """
    modules = _layered(model)
    widths = bit_widths_of(model)
    if bit_width not in widths:
        raise BitWidthError(bit_width, stored=widths, where=f"this {type(model).__name__}")
    total, count = torch.zeros(()), 0
    for module in modules:
        weight, quantizer = module.latent_weight, module.weight_quantizer
        own = quantizer.own_bit_width(bit_width)
        with torch.no_grad():
            scale = quantizer.spread_scale(weight)
            level = decode(codes_at(encode(weight, scale), own), own).float()
        cell = 2.0 ** (8 - own)
        distance = (weight.float() / scale - level) / cell
        total = total.to(distance) + distance.square().sum() / 2
        count += weight.numel()
    return total / count


def _layered(model: nn.Module) -> list[LayeredModule]:
    """The layered modules of ``model``, those with tied weights once."""
    found = {
        id(module.latent_weight): module
        for module in model.modules()
        if isinstance(module, LayeredModule)
    }
    if not found:
        raise LayeringError(
            f"{type(model).__name__} has no layered modules; get a layered copy from "
            "plyweight.prepare(model, bit_widths)."
        )
    return list(found.values())
