"""Values: what the bytes of a tensor must be, beyond their digest.

A digest says that bytes are those that were written; these checks say that they can be computed
with. The writer applies them before it publishes, the reader before it hands a tensor out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.artifact.header import Header
from plyweight.artifact.names import Role, is_pad, roles_of, split_name
from plyweight.artifact.records import TensorEntry
from plyweight.errors import ArtifactError

__all__ = ["TensorView", "ValueChecker"]

# numpy has no BF16; its bits are handed out as they are. The file is little-endian.
_NUMPY = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "I32": "<i4",
    "U32": "<u4",
    "F64": "<f8",
    "I64": "<i8",
}


@dataclass(frozen=True)
class TensorView:
    """A tensor inside the buffer of its layer, without a copy.

    Attributes:
        dtype: a key of ``ITEM_BYTES``.
        shape: of the tensor.
        data: its bytes, little-endian, C order; writable.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def numpy(self) -> NDArray[Any]:
        """The tensor as an array on the same memory; BF16 comes as its uint16 bits."""
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape)


class ValueChecker:
    """Checks the bytes of a header's tensors, one at a time."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._roles = roles_of(header.weights, header.activations)

    def check(self, entry: TensorEntry, data: memoryview) -> None:
        """Check ``data``, the bytes of ``entry``.

        Raises:
            ArtifactError: If padding is not zero, a number is not finite, a scale or step is not
                positive, or the unused bits at the end of a plane are not zero.
        """
        role = None if is_pad(entry.name) else self._roles.get(split_name(entry.name)[1])
        if is_pad(entry.name):
            if bytes(data).strip(b"\0"):
                raise ArtifactError(
                    f"padding {entry.name} has a byte that is not zero; "
                    "fetch or pack the file again."
                )
        elif role is not None and role.kind == "planes":
            self._check_unused_bits(entry, role, data)
        elif role is not None:
            _check_numbers(entry, role, np.frombuffer(data, "<f4"))

    def _check_unused_bits(self, entry: TensorEntry, role: Role, data: memoryview) -> None:
        used = self._header.weights[role.owner].num_weights % 8
        if not used:
            return
        last_bytes = np.frombuffer(data, np.uint8).reshape(entry.shape)[:, -1]
        if (last_bytes >> used).any():
            raise ArtifactError(
                f"tensor {entry.name} has bits after its last weight that are not zero; "
                "fetch or pack the file again."
            )


def _check_numbers(entry: TensorEntry, role: Role, numbers: NDArray[Any]) -> None:
    if not np.isfinite(numbers).all():
        raise ArtifactError(
            f"tensor {entry.name} holds a number that is not finite; "
            "check the training for NaN and pack the model again."
        )
    if role.kind in ("scale", "step") and not (numbers > 0).all():
        raise ArtifactError(
            f"tensor {entry.name} holds {numbers.min()}, but a {role.kind} is positive; "
            "pack the model again."
        )
