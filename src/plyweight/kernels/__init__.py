"""codes x activations: products with a weight of which the first planes are resident.

    kernel = pick()                                     "auto": the best that runs here
    matrix = kernel.matrix((out, in_), group_size=128)  holds no plane yet
    matrix.add_plane(planes[0])                         an upgrade adds, a downgrade drops one
    y = matrix.product(x, scale, 4, mode="int8")        of the first 4, whatever else is held

All bit-widths are computed from the same planes, so the fewer bits, the less is read, and there is
nothing to do at a switch. A kernel brings every plane once into a layout of its own, its compute
layout, and keeps planes apart in it. :mod:`plyweight.kernels.reference` says what a product is;
each faster kernel equals it, bit for bit in the mode "int8", within a stated bound in "float".
"""

from plyweight.kernels.matrix import MAX_GROUP_INPUTS, MODES, Mode, PlaneMatrix, ReadyScale
from plyweight.kernels.picking import KERNELS, Kernel, available, pick
from plyweight.kernels.reference import ReferenceMatrix

__all__ = [
    "KERNELS",
    "MAX_GROUP_INPUTS",
    "MODES",
    "Kernel",
    "Mode",
    "PlaneMatrix",
    "ReadyScale",
    "ReferenceMatrix",
    "available",
    "pick",
]
