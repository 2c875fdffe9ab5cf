"""Parameter groups: what decays, what does not, and how fast each bit-width's own rows learn.

Weight decay pulls towards zero, which for a clip, a step or a gain means "quantize more coarsely",
and for a batch norm's scale nothing good either; so only weights decay. That narrow bit-widths may
need lower rates for their scales is the finding of Huang et al., "Nearly Lossless Adaptive Bit
Switching" (arXiv 2502.01199).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn.bit_width import bit_widths_of
from plyweight.nn.rows import row_parameters
from plyweight.quantizers import Switchable

__all__ = ["RateByBitWidth", "parameter_groups"]


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    learning_rate: float | None = None,
    scale_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` as groups for an optimizer.

    Args:
        model: from :func:`plyweight.prepare`; a float model may be given as well.
        weight_decay: of weights with two dimensions or more; scales (clips, gains, steps), norms
            and biases have none.
        learning_rate: of all groups; None for the optimizer's own.
        scale_rate: what it is multiplied by for scales; a ``learning_rate`` is needed if not 1.

    Returns:
        Groups named "weights", "scales" and "others", those without parameters left out.

    Raises:
        LayeringError: If a rate or decay is not a number of 0 or more, or nothing is trainable.
    """
    _check_rate("weight_decay", weight_decay)
    _check_rate("scale_rate", scale_rate)
    if learning_rate is not None:
        _check_rate("learning_rate", learning_rate)
    elif scale_rate != 1:
        raise LayeringError(
            f"scale_rate is {scale_rate}, a multiple of learning_rate; give that too."
        )
    scales = {id(p) for module in model.modules() for p in _scales(module)}
    plain = {id(p) for module in model.modules() for p in _norm_parameters(module)}
    plain |= {id(row.parameter) for row in row_parameters(model)}  # biases by bit-width
    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "weight_decay": weight_decay},
        "scales": {"params": [], "weight_decay": 0.0},
        "others": {"params": [], "weight_decay": 0.0},
    }
    if learning_rate is not None:
        for name, group in groups.items():
            group["lr"] = learning_rate * (scale_rate if name == "scales" else 1.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_plain = parameter.dim() < 2 or id(parameter) in plain
            kind = "scales" if id(parameter) in scales else "others" if is_plain else "weights"
            groups[kind]["params"].append(parameter)
    found = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not found:
        raise LayeringError(f"{type(model).__name__} has no trainable parameters.")
    return found


class RateByBitWidth:
    """A learning rate of its own for what each bit-width has of its own.

    Those parameters (gains, activation steps, batch norms) are rows of tables, and a group of an
    optimizer cannot hold a row. So each step of the optimizer is shortened afterwards, row by row:
    ``row = before + factor * (after - before)``, which is a learning rate times ``factor`` with
    whatever optimizer.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, factors: Mapping[int, float]
    ) -> None:
        """Shorten every step of ``optimizer`` from now on.

        Args:
            optimizer: of the parameters of ``model``.
            model: from :func:`plyweight.prepare`.
            factors: by bit-width, 0 or more; 1 where missing. A row that several bit-widths share
                takes the factor of the widest.

        Raises:
            BitWidthError: If ``factors`` names a bit-width that the model does not have.
            LayeringError: If a factor is not a number of 0 or more.
        """
        widths = bit_widths_of(model)
        for bit_width, factor in factors.items():
            if bit_width not in widths:
                raise BitWidthError(bit_width, stored=widths, where="the model")
            _check_rate(f"factors[{bit_width}]", factor)
        self._tables = [
            (row.parameter, _column([factors.get(b, 1.0) for b in row.bit_widths], row.parameter))
            for row in row_parameters(model)
        ]
        self._before: list[Tensor] = []
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._shorten)

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self._before = [parameter.clone() for parameter, _ in self._tables]

    @torch.no_grad()
    def _shorten(self, *_: Any) -> None:
        for (parameter, factors), before in zip(self._tables, self._before, strict=True):
            parameter.copy_(torch.lerp(before, parameter, factors.to(parameter)))


def _check_rate(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 <= float(value) < float("inf")):  # type: ignore[arg-type]
        raise LayeringError(f"{name} is {value!r}; give a number of 0 or more.")


def _scales(module: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of a quantizer."""
    is_quantizer = isinstance(module, Switchable) and not _is_norm(module)
    return module.parameters(recurse=False) if is_quantizer else ()


def _norm_parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    return module.parameters(recurse=False) if _is_norm(module) else ()


def _is_norm(module: nn.Module) -> bool:
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, norms)


def _column(rows: list[float], parameter: Tensor) -> Tensor:
    return torch.tensor(rows).view(-1, *[1] * (parameter.dim() - 1))
