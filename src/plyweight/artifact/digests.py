"""Digests: of a layer's bytes as they pass, so that no byte is hashed more often than it must be.

A layer has a digest for each chunk, which is what its bytes are checked against, and one of all
its bytes, which is its name wherever layers are kept. In a layer of one chunk the two are the same.
"""

import hashlib

from plyweight.artifact.records import Layer

__all__ = ["NO_BYTES", "LayerDigests"]

NO_BYTES = hashlib.sha256().hexdigest()  # of a layer without any


class LayerDigests:
    """The digests of a stream as long as ``layer``, whatever digests ``layer`` itself states."""

    def __init__(self, layer: Layer) -> None:
        self._chunk_bytes = self._left = layer.chunk_bytes
        self._chunk = hashlib.sha256()
        self._whole = hashlib.sha256() if layer.num_chunks > 1 else None
        self._done: list[bytes] = []

    def update(self, data: memoryview) -> None:
        """Take the bytes that come next."""
        if self._whole is not None:
            self._whole.update(data)
        while len(data):
            part, data = data[: self._left], data[self._left :]
            self._chunk.update(part)
            self._left -= len(part)
            if not self._left:
                self._done.append(self._chunk.digest())
                self._chunk, self._left = hashlib.sha256(), self._chunk_bytes

    def chunks(self) -> tuple[bytes, ...]:
        """Of the chunks so far, the last and shorter one included."""
        rest = () if self._left == self._chunk_bytes else (self._chunk.digest(),)
        return (*self._done, *rest)

    def sha256(self) -> str:
        """Of all bytes so far, in hexadecimal."""
        if self._whole is not None:
            return self._whole.hexdigest()
        return self.chunks()[0].hex() if self.chunks() else NO_BYTES
