"""Balance: how much the gradient of each bit-width counts in a step.

The bit-widths of a step are objectives of one set of shared parameters. With ``J`` the matrix whose
rows are their gradients, the step follows

    Jᵀ c        c = balance(G),    G = J Jᵀ

    mean      c_b = 1/n                                        no Gramian, no memory
    mgda      the shortest vector in the convex hull of the gradients, each first brought to
              length 1, for otherwise the longest starves the others
    upgrad    every gradient is projected onto the cone that no objective objects to, then averaged

The weights of the bit-widths are in ``J`` already, row ``b`` being ``n weight_b`` times a gradient,
so the mean is the weighted mean. The solvers are TorchJD's. Sources: Désidéri, "Multiple-gradient
descent algorithm" (2012); Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization"
(NeurIPS 2018); Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization" (2024).

What it costs: the gradients of a step's bit-widths are all kept, ``n`` times the parameters.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from plyweight.errors import LayeringError
from plyweight.nn.rows import row_parameters

__all__ = ["Balance", "BalanceName", "GradientStash", "NormalizedMGDA", "balance_named"]

BalanceName = Literal["mean", "mgda", "upgrad"]


class Balance(Protocol):
    """Any function from the Gramian to coefficients; TorchJD's Gramian weightings are such."""

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Coefficients ``(n,)`` for the symmetric Gramian ``(n, n)``, widest bit-width first.

        They should sum to about 1, so that the learning rate means what it means for the mean.
        The Gramian is float64 and on the CPU.
        """


class NormalizedMGDA:
    """MGDA on gradients of length 1: the direction along which all of them descend alike.

    With ``a`` the solution for the normalized gradients, ``c_b = a_b / |g_b|``, brought to sum 1.
    """

    def __init__(self) -> None:
        from torchjd.aggregation import MGDAWeighting  # only those who balance need TorchJD

        self._weighting = MGDAWeighting()

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Coefficients ``(n,)`` of sum 1."""
        norms = gramian.diagonal().sqrt()
        norms = torch.where(norms > 0, norms, 1.0)
        cosines = gramian / torch.outer(norms, norms)
        # A gradient that is 0 objects to nothing; as the shortest vector it would stop all others.
        cosines.fill_diagonal_(1.0)
        coefficients: Tensor = self._weighting(cosines) / norms
        return coefficients / coefficients.sum()


def balance_named(balance: BalanceName | Balance) -> Balance | None:
    """The balance itself or the one of that name; None for the mean, which needs none.

    Raises:
        LayeringError: If there is none of that name, or it is not a function.
        ImportError: If TorchJD, which has the solvers, is not installed.
    """
    if balance == "mean":
        return None
    if balance == "mgda":
        return NormalizedMGDA()
    if balance == "upgrad":
        from torchjd.aggregation import UPGradWeighting

        return UPGradWeighting()
    if callable(balance):
        return balance
    raise LayeringError(
        f"balance is {balance!r}; give 'mean', 'mgda', 'upgrad' or a function of the Gramian."
    )


class GradientStash:
    """The gradients of a step's bit-widths, taken off the parameters one after another.

    Attributes:
        shared: whether each parameter is shared by the bit-widths. Those with a row for each
            (batch norms, steps, gains) are no common ground: they take their own gradient as it is.
    """

    def __init__(self, model: nn.Module, *, copy: bool) -> None:
        """Take what was accumulated before off the parameters of ``model``.

        Args:
            model: its trainable parameters are looked after.
            copy: whether gradients are copied, because their memory will be used again: buckets
                of DistributedDataParallel, CUDA graphs.
        """
        private = {id(r.parameter) for r in row_parameters(model) if len(r.bit_widths) > 1}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.shared = [id(p) not in private for p in self.parameters]
        self._copy = copy
        self._before = self._take()
        self._rows: list[list[Tensor | None]] = []

    def take_row(self) -> None:
        """Take the gradients of one bit-width."""
        self._rows.append(self._take())

    def gramian(self) -> Tensor:
        """``J Jᵀ`` over the shared parameters, float64 ``(n, n)``, on the CPU."""
        n = len(self._rows)
        total: Tensor | None = None
        for index, is_shared in enumerate(self.shared):
            gradients = [row[index] for row in self._rows]
            if not is_shared or all(g is None for g in gradients):
                continue
            J = torch.stack(_dense(gradients)).float()
            G = J @ J.T
            total = G if total is None else total + G.to(total.device)
        return torch.zeros(n, n, dtype=torch.float64) if total is None else total.cpu().double()

    def give_back(self, coefficients: Tensor) -> None:
        """Leave on the parameters what was there before, and the rows put together.

        Args:
            coefficients: ``(n,)`` for shared parameters; the others take the mean.
        """
        n = len(self._rows)
        balanced = [float(c) for c in coefficients]
        for index, parameter in enumerate(self.parameters):
            factors = balanced if self.shared[index] else [1 / n] * n
            result = self._before[index]
            for row, factor in zip(self._rows, factors, strict=True):
                gradient = row[index]
                if gradient is not None:
                    # In place: the rows are not needed any more, and are what fills the memory.
                    part = gradient.mul_(factor)
                    result = part if result is None else result.add_(part)
                    row[index] = None
            parameter.grad = result

    def _take(self) -> list[Tensor | None]:
        taken = []
        for parameter in self.parameters:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and gradient.is_sparse:
                raise LayeringError(
                    "a parameter has sparse gradients, which cannot be balanced; "
                    "use balance='mean', or an embedding with sparse=False."
                )
            taken.append(gradient.clone() if self._copy and gradient is not None else gradient)
        return taken


def _dense(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Flat, and zeros for a bit-width that the parameter has no part in."""
    template = next(g for g in gradients if g is not None)
    return [(torch.zeros_like(template) if g is None else g).flatten() for g in gradients]
