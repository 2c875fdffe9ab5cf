"""Memory for large short-lived tensors, which goes back to the system with them.

What is freed usually stays with the process: the C library keeps blocks of up to 32 MB for what is
asked for next, and how much that comes to depends on everything else that happened. A decoded
weight is the largest thing that a packed model needs and lives for one call, so it gets pages of
its own. They are huge pages where the system has them, without which a large tensor takes longer
to be there than to be filled (67 MB on a virtual machine: 12 instead of 91 ms).
"""

import contextlib
import mmap
from math import prod

import torch
from torch import Tensor

__all__ = ["PAGE_BYTES", "empty"]

PAGE_BYTES = 2**21  # a huge page; smaller tensors are left to the C library


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape)`` on the CPU, on pages of its own where it fills one."""
    num_values = prod(shape)
    num_bytes = num_values * dtype.itemsize
    if num_bytes < PAGE_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows has none
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        pages = mmap.mmap(
            -1, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError:  # no memory, or too many maps; torch says it, or has some left
        return torch.empty(shape, dtype=dtype, device="cpu")
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps `pages`, and they are unmapped when it is let go.
    return torch.frombuffer(pages, dtype=dtype, count=num_values).reshape(shape)
