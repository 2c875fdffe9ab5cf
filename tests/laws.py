"""Laws that hold in more than one room, as functions."""

import numpy as np

from plyweight.codec import codes_at, from_planes, plane_bytes, to_planes


def assert_planes_nest(codes):
    """The first planes of uint8 ``codes`` are the narrower codes, and nothing else is stored."""
    planes = to_planes(codes, 8)
    assert planes.shape == (8, plane_bytes(codes.shape))
    for bit_width in range(1, 9):
        narrower = from_planes(planes[:bit_width], codes.shape)
        assert narrower.dtype == np.uint8
        assert np.array_equal(narrower, codes >> (8 - bit_width))
        assert np.array_equal(narrower, codes_at(codes, bit_width))


def formula_levels(codes, bit_width):
    """What docs/method.md says that ``bit_width``-bit ``codes`` decode to, in plain integers."""
    dropped = 8 - bit_width
    levels = []
    for code in np.asarray(codes).reshape(-1).tolist():
        sign, magnitude = code >> (bit_width - 1), code & ((1 << (bit_width - 1)) - 1)
        level = (magnitude << dropped) + (1 << dropped >> 1)
        levels.append(-level if sign else level)
    return np.array(levels, np.int8).reshape(np.shape(codes))
