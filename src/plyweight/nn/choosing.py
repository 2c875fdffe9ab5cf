"""Which kernel the linear modules of a model multiply with: all of them, or none is changed."""

from torch import nn

from plyweight.errors import LayeringError
from plyweight.kernels import Mode
from plyweight.nn.kernel_weight import choose, chosen, require_kernel
from plyweight.nn.lease import change, leased_parts
from plyweight.nn.packed import PackedLinear, PackedWeight

__all__ = ["set_kernel"]


def set_kernel(model: nn.Module, kernel: str = "auto", *, mode: Mode = "float") -> None:
    """Let the linear modules of a loaded ``model`` multiply with ``kernel`` from now on.

    The planes move into the kernel's layout, weight by weight; they are not kept twice. Calls of
    other threads that are under way end as they began, and this waits for them.

    Convolutions and embeddings keep decoding their weights. A weight that an embedding shares with
    a linear module is decoded for it to the same values, from the kernel's layout.

    Args:
        model: from :func:`plyweight.load`, in packed form.
        kernel: "reference" decodes the weight and multiplies with torch: what was trained, bit
            for bit. "auto" is the best kernel that is built and runs on the model's device.
            "avx512", "avx2", "neon", "portable" and "triton" are demands.
        mode: "float": nothing is rounded but sums, which are made in another order than torch's,
            in float32: of a float64 model activations and results are rounded to that, for its
            weights come from levels and float32 scales anyway.
            "int8": every row of activations (or row and group, where scales have groups) is
            rounded to 8 bits on the way, and sums are integers: faster, and a choice about
            accuracy that is the caller's to make.

    Raises:
        KernelError: If the kernel is not here, or cannot compute that; the model stays as it was.
        LayeringError: If no linear module of the model is packed, or this thread holds a lease.
    """
    weights = _weights_of(model)
    if not weights:
        raise LayeringError(
            f"this {type(model).__name__} has no packed linear module; set_kernel takes a model "
            "from plyweight.load(file, model) in packed form."
        )
    for weight in weights:
        require_kernel(weight, kernel, mode)  # before anybody waits
    parts = leased_parts(model.modules())
    leased = {id(weight) for part in parts for weight in _weights_of(part)}
    free = [weight for weight in weights if id(weight) not in leased]
    before = {id(weight): chosen(weight) for weight in weights}
    done: list[nn.Module] = []

    def choose_in(part: nn.Module) -> None:
        done.append(part)
        _choose_all(_weights_of(part), kernel, mode)

    try:
        for part in parts:
            change(part, lambda part=part: choose_in(part))  # type: ignore[misc]
        _choose_all(free, kernel, mode)
    except BaseException:  # not some parts with one and some with another
        for part in done:
            change(part, lambda part=part: _undo(_weights_of(part), before))  # type: ignore[misc]
        raise


def _choose_all(weights: list[PackedWeight], kernel: str, mode: Mode) -> None:
    before = {id(weight): chosen(weight) for weight in weights}
    try:
        for weight in weights:
            choose(weight, kernel, mode)
    except BaseException:  # no memory, or interrupted: not some with one and some with another
        _undo(weights, before)
        raise


def _undo(weights: list[PackedWeight], before: dict[int, tuple[str, Mode]]) -> None:
    for weight in weights:
        choose(weight, *before[id(weight)])


def _weights_of(model: nn.Module) -> list[PackedWeight]:
    """The packed weights that linear modules multiply with, each once."""
    linear = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return list({id(module.packed_weight): module.packed_weight for module in linear}.values())
