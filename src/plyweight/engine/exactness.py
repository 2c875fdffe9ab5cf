"""Exactness: whether this machine adds products of unsigned and signed bytes without saturating.

x86 without VNNI instructions multiplies bytes in pairs and adds each pair in 16 bits: 2 * 255 * 127
is 64,770, and becomes 32,767. ONNX Runtime then has an option under which weights become unsigned
when a session starts, and all sums are exact; but it acts on machines with VNNI too, and makes
convolutions there 2.5 times slower (64 channels of 56 x 56, 3 x 3; Zen 4; onnxruntime 1.32). So
the machine is asked: one product of two matrices tells.
"""

import functools
from typing import Any

import numpy as np

__all__ = ["does_saturate"]

ROWS, INNER, COLUMNS = 8, 64, 16
LARGEST_UNSIGNED, LARGEST_SIGNED = 255, 127

# MatMulInteger of x, uint8 (8, 64), and w, a slot of int8 (64, 16), giving sums, int32 (8, 16):
# onnx.helper makes it in tests/engine/test_exactness.py.
PROBE = bytes.fromhex(
    "08043a8a010a1b0a01780a0177120473756d73220d4d61744d756c496e74656765721201702a3b0840081010"
    "034201776a110a086c6f636174696f6e1205736c6f74736a0b0a066f66667365741201306a0e0a066c656e67"
    "746812043130323470015a130a0178120e0a0c080212080a0208080a02084062160a0473756d73120e0a0c08"
    "0612080a0208080a02081042040a00100a"
)


@functools.cache
def does_saturate(runtime: Any) -> bool:
    """Whether ``runtime``, the module onnxruntime, computes wrong sums of products here.

    The answer is found once per process; it takes a few milliseconds.
    """
    weight = np.full((INNER, COLUMNS), LARGEST_SIGNED, np.int8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_external_initializers(["w"], [runtime.OrtValue.ortvalue_from_numpy(weight)])
    session = runtime.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    x = np.full((ROWS, INNER), LARGEST_UNSIGNED, np.uint8)
    (sums,) = session.run(["sums"], {"x": x})
    return bool((sums != INNER * LARGEST_UNSIGNED * LARGEST_SIGNED).any())
