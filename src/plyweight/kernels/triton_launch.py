"""Launching the Triton kernels: which one, in which shape, and with how many stages.

Nothing here waits for the device, so launches can be captured in a CUDA graph; with parts, one
buffer is allocated on the way, which a graph keeps. A plan is chosen by :func:`plan_for` from the
shape alone, or once by measurement (:func:`tune`), and is then remembered for that device, shape,
group size, dtype, bit-width and number of rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from plyweight.kernels import triton_code
from plyweight.kernels.triton_layout import INPUTS, OUTPUTS

__all__ = [
    "EMULATED",
    "IS_WIDE",
    "MAX_ROWS",
    "Plan",
    "Seconds",
    "candidates",
    "plan_for",
    "product",
    "tune",
    "values",
]

MAX_ROWS = 64  # of activations; for more, decoding once and the BLAS is faster
FEW_ROWS = 16  # up to which a program computes 16 outputs only, and its warps share the inputs

# TRITON_INTERPRET=1 when triton was first imported: kernels run in Python, on tensors of the CPU.
EMULATED = not isinstance(triton_code.product_of_few, triton.JITFunction)

# Up to 3.7, the compiler gives a lane 4 neighbouring inputs of a 16-bit operand that was joined
# (`computeOrigBitWidth` in AccelerateMatmul.cpp), and 2 since. A wrong guess costs exchanges
# between lanes, no correctness.
IS_WIDE = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)

# Of shared memory that the loads under way take in a program, at most: two programs then fit a
# multiprocessor of Hopper.
STAGES_BYTES = 96 * 2**10

# A multiplication and a subtraction become one instruction; where levels are made both are exact.
FUSION = True

_EXPONENT = {False: 0x64006400, True: 0x43004300}  # of two float16, of two bfloat16


@dataclass(frozen=True)
class Plan:
    """How a product is launched.

    Attributes:
        is_few: ``product_of_few``, else ``product_of_many``.
        rows: of activations that fit, a power of two.
        warps: of a program.
        stages: of the pipeline of loads.
        parts: that the inputs are cut in, each for programs of its own.
    """

    is_few: bool
    rows: int
    warps: int
    stages: int
    parts: int = 1


Seconds = Callable[[Plan], float]
Key = tuple[object, ...]
_tuned: dict[Key, Plan] = {}


def product(
    x: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    num_outputs: int,
    group_size: int | None,
    plan: Plan | None = None,
) -> Tensor:
    """``x @ weight.T`` for at most MAX_ROWS rows, ``(m, in)`` to ``(m, out)`` of x's dtype.

    Args:
        x: float16, bfloat16 or float32, C-contiguous.
        planes: those of the bit-width, in the compute layout, ones' complement.
        scale: float32 ``(out,)`` or ``(out, groups)``, C-contiguous.
        num_outputs: of the weight.
        group_size: 32, 64, 128, or None.
        plan: None for the one that was tuned, or is chosen by shape.
    """
    if plan is None:
        plan = _tuned.get(_key(x, planes, num_outputs, group_size)) or plan_for(
            x, planes, num_outputs
        )
    rows, num_inputs = x.shape
    row_blocks, blocks, _ = planes[0].shape
    y = x.new_empty(rows, num_outputs)
    to = y if plan.parts == 1 else x.new_empty(plan.parts, *y.shape, dtype=torch.float32)
    kernel = triton_code.product_of_few if plan.is_few else triton_code.product_of_many
    grid = (row_blocks, 1) if plan.is_few else (-(-row_blocks // plan.warps), plan.parts)
    is_short = x.dtype != torch.float16  # a float32 is multiplied as three bfloat16
    with _device_of(x):
        kernel[grid](
            x,
            to,
            scale,
            *_eight(planes),
            rows,
            num_outputs,
            num_inputs,
            _num_groups(scale),
            row_blocks,
            blocks,
            _EXPONENT[is_short and len(planes) < 5],
            _unit(len(planes)),
            BITS=len(planes),
            GROUP=group_size or INPUTS,
            ROWS=plan.rows,
            WARPS=plan.warps,
            WIDE=IS_WIDE,
            **({} if plan.is_few else {"TILE_WIDE": _tile_is_wide(x.device)}),
            BFLOAT=is_short,
            EMULATED=EMULATED,
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=FUSION,
        )
        if plan.parts > 1:
            size = y.numel()
            triton_code.sum_of_parts[(-(-size // 1024),)](
                to, y, size, plan.parts, BLOCK=1024, enable_fp_fusion=FUSION
            )
    return y


def values(
    planes: Sequence[Tensor],
    scale: Tensor,
    shape: tuple[int, int],
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight ``(out, in)``: levels times scales in float32, rounded once to ``dtype``."""
    y = torch.empty(shape, dtype=dtype, device=scale.device)
    row_blocks, blocks, _ = planes[0].shape
    with _device_of(y):
        triton_code.values_of_blocks[(row_blocks, blocks)](
            y,
            scale,
            *_eight(planes),
            *shape,
            _num_groups(scale),
            blocks,
            _EXPONENT[False],
            _unit(len(planes)),
            BITS=len(planes),
            GROUP=group_size or INPUTS,
            WIDE=IS_WIDE,
            EMULATED=EMULATED,
            num_warps=1,
            enable_fp_fusion=FUSION,
        )
    return y


def plan_for(x: Tensor, planes: Sequence[Tensor], num_outputs: int) -> Plan:
    """The plan for a shape of which nothing was measured."""
    rows, row_blocks, blocks = len(x), *planes[0].shape[:2]
    fits = max(triton.next_power_of_2(rows), 8 if _is_nvidia() else 16)
    if rows <= FEW_ROWS:
        # More warps where there are too few outputs to go round: they share the inputs.
        warps = 8 if row_blocks < 2 * _num_multiprocessors(x.device) else 4
        plan = Plan(True, fits, min(warps, max(triton.next_power_of_2(blocks), 2)), 1)
    else:
        warps = 4 if num_outputs > 2 * OUTPUTS else 2
        programs = -(-row_blocks // warps)
        parts = min(-(-2 * _num_multiprocessors(x.device) // programs), max(blocks // 4, 1), 16)
        plan = Plan(False, fits, warps, 1, parts)
    return _staged(plan, x, len(planes))


def candidates(x: Tensor, planes: Sequence[Tensor], num_outputs: int) -> list[Plan]:
    """Plans worth measuring, the one by shape first."""
    plan = plan_for(x, planes, num_outputs)
    blocks = planes[0].shape[1]
    others: list[Plan] = []
    for warps in (2, 4, 8):
        if plan.is_few:
            others.append(replace(plan, warps=warps))
        else:
            others += [replace(plan, warps=warps, parts=n) for n in (1, 2, 4, 8) if n <= blocks]
    staged = [_staged(other, x, len(planes), deepest=n) for other in others for n in (3, 5)]
    return list(dict.fromkeys((plan, *staged)))


def tune(
    x: Tensor,
    planes: Sequence[Tensor],
    num_outputs: int,
    group_size: int | None,
    seconds_of: Seconds,
) -> None:
    """Measure the candidates and remember the fastest for this shape and width."""
    seconds: dict[Plan, float] = {}
    for plan in candidates(x, planes, num_outputs):
        try:
            seconds[plan] = seconds_of(plan)
        except triton.OutOfResources:  # too much shared memory for this device
            continue
    _tuned[_key(x, planes, num_outputs, group_size)] = min(seconds, key=seconds.__getitem__)


def _key(x: Tensor, planes: Sequence[Tensor], num_outputs: int, group_size: int | None) -> Key:
    rows = triton.next_power_of_2(len(x))
    return (x.device, x.dtype, rows, x.shape[1], num_outputs, group_size, len(planes))


def _staged(plan: Plan, x: Tensor, bits: int, deepest: int = 5) -> Plan:
    """``plan`` with as many stages as fit, so that enough loads are under way."""
    per_warp = bits * 4 * triton_code.WORDS.value
    rows_bytes = INPUTS * plan.rows * x.element_size()
    stage = plan.warps * (per_warp + rows_bytes) if plan.is_few else plan.warps * per_warp
    stage += 0 if plan.is_few else rows_bytes
    return replace(plan, stages=1 + max(1, min(deepest - 1, _stages_bytes(x.device) // stage)))


def _eight(planes: Sequence[Tensor]) -> list[Tensor]:
    """``planes``, and the first again where there are fewer than the kernels have names for."""
    return [*planes, *[planes[0]] * (8 - len(planes))]


def _num_groups(scale: Tensor) -> int:
    return scale.shape[1] if scale.dim() == 2 else 1


def _unit(bits: int) -> float:
    """The level of the lowest bit of a field that holds a code of ``bits`` bits."""
    return 2.0 ** (8 - (bits if bits < 3 else 4 if bits < 5 else 8))


def _device_of(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _is_nvidia() -> bool:
    return torch.version.hip is None


@cache
def _tile_is_wide(device: torch.device) -> bool:
    """Whether ``product_of_many`` gets 4 neighbouring inputs a lane there."""
    if device.type != "cuda" or not _is_nvidia():
        return IS_WIDE
    # Hopper's matrix unit for four warps always takes 2.
    return IS_WIDE and torch.cuda.get_device_capability(device)[0] != 9


@cache
def _stages_bytes(device: torch.device) -> int:
    """Of STAGES_BYTES, what the device has; 4 kB are left for other uses."""
    if device.type != "cuda":
        return STAGES_BYTES
    properties = torch.cuda.get_device_properties(device)
    has = getattr(properties, "shared_memory_per_block_optin", 2**16)  # ROCm does not say
    return min(STAGES_BYTES, has - 2**12)


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
