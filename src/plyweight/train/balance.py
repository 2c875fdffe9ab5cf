"""Balance: how much the gradient of each bit-width counts in a step.

The bit-widths of a step are objectives of one set of shared parameters. With ``J`` the matrix whose
rows are their gradients, the step follows

    Jᵀ c        c = balance(G),    G = J Jᵀ

    mean      c_b = 1/n                                        no Gramian, no memory
    mgda      the shortest vector in the convex hull of the gradients, each first brought to
              length 1, for otherwise it is nearly the shortest of them, and starves the others
    upgrad    every gradient is projected onto the cone that no objective objects to, then averaged

The weights of the bit-widths are in ``J`` already, row ``b`` being ``n weight_b`` times a gradient,
so the mean is the weighted mean. None of them depends on the unit of the loss, so a loss may be
scaled. The solvers are TorchJD's. Sources: Désidéri, "Multiple-gradient
descent algorithm" (2012); Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization"
(NeurIPS 2018); Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization" (2024).

What it costs: the gradients of a step's bit-widths are all kept, ``n`` times the parameters.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from plyweight.errors import LayeringError
from plyweight.nn.rows import row_parameters

__all__ = ["Balance", "BalanceName", "GradientStash", "NormalizedMGDA", "UPGrad", "balance_named"]

BalanceName = Literal["mean", "mgda", "upgrad"]


class Balance(Protocol):
    """Any function from the Gramian to coefficients; TorchJD's Gramian weightings are such."""

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Coefficients ``(n,)`` for the symmetric Gramian ``(n, n)``, widest bit-width first.

        The step should be about as long as the mean's, so that the learning rate means the same.
        The Gramian is float64 and on the CPU.
        """


class NormalizedMGDA:
    """MGDA on gradients of length 1: the direction along which all of them descend alike.

    With ``a`` the solution for the normalized gradients, ``c_b = a_b mean(|g|) / |g_b|``: as long
    as if all gradients had their mean length. A gradient of 0 objects to nothing and is left out;
    as the shortest vector it would stop all others.
    """

    def __init__(self) -> None:
        self._weighting = _solver("MGDAWeighting")

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Coefficients ``(n,)``."""
        coefficients = torch.zeros_like(gramian.diagonal())
        is_long = gramian.diagonal() > 0
        if is_long.any():
            part = gramian[is_long][:, is_long]
            norms = part.diagonal().sqrt()
            solution = self._weighting(part / torch.outer(norms, norms))
            coefficients[is_long] = solution * norms.mean() / norms
        return coefficients


class UPGrad:
    """UPGrad on the Gramian over its trace, for the solver's tolerances are absolute."""

    def __init__(self) -> None:
        self._weighting = _solver("UPGradWeighting")

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Coefficients ``(n,)``."""
        trace = gramian.trace()
        coefficients: Tensor = self._weighting(gramian / trace if trace > 0 else gramian)
        return coefficients


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
        return UPGrad()
    if callable(balance):
        return balance
    raise LayeringError(
        f"balance is {balance!r}; give 'mean', 'mgda', 'upgrad' or a function of the Gramian."
    )


def _solver(name: str) -> Callable[[Tensor], Tensor]:
    """One of TorchJD's weightings; only those who balance need it installed."""
    try:
        from torchjd import aggregation
    except ModuleNotFoundError as error:
        raise ImportError(
            "this balance needs TorchJD, which is not installed; "
            'install it with: pip install "plyweight[train]"'
        ) from error
    weighting: Callable[[Tensor], Tensor] = getattr(aggregation, name)()
    return weighting


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
            # Autocast would multiply in half precision, however the operands came.
            with torch.autocast(J.device.type, enabled=False):
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

    def restore(self) -> None:
        """Leave on the parameters what was there before, for a step that failed."""
        for parameter, before in zip(self.parameters, self._before, strict=True):
            parameter.grad = before

    def _take(self) -> list[Tensor | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            raise LayeringError(
                "a parameter has sparse gradients, which cannot be balanced; "
                "use balance='mean', or an embedding with sparse=False."
            )
        for parameter in self.parameters:
            parameter.grad = None
        return [g.clone() if self._copy and g is not None else g for g in gradients]


def _dense(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Flat, and zeros for a bit-width that the parameter has no part in."""
    template = next(g for g in gradients if g is not None)
    return [(torch.zeros_like(template) if g is None else g).flatten() for g in gradients]
