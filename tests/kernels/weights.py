"""Weights and kernels for the tests of products."""

import numpy as np
import pytest

from plyweight.codec import decode, to_planes
from plyweight.kernels import KERNELS, available, pick

ON_CPU = [name for name in KERNELS if name != "triton"]


def require(kernel):
    """Skip a test of a kernel that does not run here, and say so."""
    if kernel not in available():
        pytest.skip(f"the kernel {kernel!r} does not run here, only {', '.join(available())}")


def drawn(seed, out, num_inputs, *, m=3, group_size=None):
    """Activations, codes and a scale, of sizes that differ from row to row."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, num_inputs)) * rng.uniform(0.01, 10, (m, 1))
    codes = rng.integers(0, 256, (out, num_inputs)).astype(np.uint8)
    groups = () if group_size is None else (-(-num_inputs // group_size),)
    scale = (rng.random((out, *groups)) + 0.01).astype(np.float32)
    return x.astype(np.float32), codes, scale


def matrix_of(kernel, codes, *, group_size=None, num_planes=8):
    """The first planes of ``codes``, held by ``kernel``."""
    matrix = pick(kernel).matrix(codes.shape, group_size=group_size)
    for plane in to_planes(codes, 8)[:num_planes]:
        matrix.add_plane(plane)
    return matrix


def levels_of(codes, bit_width):
    return decode(codes >> (8 - bit_width), bit_width)
