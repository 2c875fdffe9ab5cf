"""What a layered weight is: codes, planes, decoding (numpy; operators also take torch tensors)."""

from plyweight.codec.codes import (
    MAGNITUDES,
    MAX_BIT_WIDTH,
    codes_at,
    decode,
    encode,
    inner_levels,
    spread,
)
from plyweight.codec.planes import from_planes, levels_from_planes, plane_bytes, to_planes

__all__ = [
    "MAGNITUDES",
    "MAX_BIT_WIDTH",
    "codes_at",
    "decode",
    "encode",
    "from_planes",
    "inner_levels",
    "levels_from_planes",
    "plane_bytes",
    "spread",
    "to_planes",
]
