"""Parts: a split artifact on this machine, as if it were one file."""

import os
from itertools import accumulate, pairwise
from pathlib import Path

from plyweight.artifact.header import Header
from plyweight.artifact.layout import ByteRange
from plyweight.artifact.sidecar import MAX_SIDECAR_BYTES, SIDECAR_FILE, Part, Sidecar
from plyweight.artifact.source import FileSource
from plyweight.errors import ArtifactError, RangeError, SourceError, TruncatedError

__all__ = ["SplitSource"]


class SplitSource:
    """The parts in a folder as one source: a whole artifact, or a prefix of one.

    The header is verified here, and its agreement with the sidecar; layers are verified by whoever
    reads them. Files are held open until the source is garbage collected.

    Attributes:
        sidecar: what ``layers.json`` says.
        header: of the artifact.
        num_held: how many layers are there.

    Raises:
        SourceError: If ``layers.json``, the header or the base layer is missing, or a layer is
            missing while a later one is there.
        ArtifactError: If the sidecar or the header is wrong, or a file ends inside a part.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name = os.fspath(folder)
        self._folder = Path(folder)
        self.sidecar = _read_sidecar(self._folder / SIDECAR_FILE)
        self._files: dict[str, FileSource] = {}
        self._parts = self._parts_there()
        self.num_held = len(self._parts) - 1
        self._require_ends()
        self._stops = tuple(accumulate(part.num_bytes for part in self._parts))
        raw = self.read(ByteRange(0, self.sidecar.header.num_bytes))
        self.header = Header.parse(raw)
        self.sidecar.check(self.header)

    def size(self) -> int:
        """Bytes of the parts that are there."""
        return self._stops[-1]

    def read(self, byte_range: ByteRange) -> bytearray:
        """Exactly the bytes of ``byte_range``, counted as in the artifact's one file."""
        if not 0 <= byte_range.start <= byte_range.stop <= self.size():
            raise RangeError(
                f"bytes {byte_range} were asked for, but {self.name} has {self.size()} bytes; "
                "ask inside those."
            )
        pieces = []
        for part, (first, last) in zip(self._parts, pairwise((0, *self._stops)), strict=True):
            start, stop = max(byte_range.start, first), min(byte_range.stop, last)
            if start < stop:
                inside = ByteRange(start, stop).shifted(part.offset - first)
                pieces.append(self._files[part.file].read(inside))
        return pieces[0] if len(pieces) == 1 else bytearray().join(pieces)

    def _parts_there(self) -> tuple[Part, ...]:
        """The header and the first layers."""
        there: list[Part] = []
        missing: Part | None = None
        for part in self.sidecar.parts:
            if not self._is_there(part):
                missing = missing or part
            elif missing is None:
                there.append(part)
            elif part.num_bytes:
                raise SourceError(
                    f"{self.name} has {part.file} and lacks {missing.file}, without which it says "
                    "nothing; fetch that too, or delete what comes after it."
                )
        if missing is not None and len(there) < 2:
            raise SourceError(
                f"{self.name} lacks {missing.file}, which every bit-width needs; fetch it."
            )
        return tuple(there)

    def _is_there(self, part: Part) -> bool:
        """Whether the file has the part; one that ends before it, where another does, has not."""
        if not part.num_bytes:
            return True  # held with the one before it
        if part.file not in self._files:
            path = self._folder / part.file
            if not path.exists():
                return False
            self._files[part.file] = FileSource(path)
        size = self._files[part.file].size()
        if part.offset and size <= part.offset:
            return False
        if size < part.offset + part.num_bytes:
            raise TruncatedError(
                f"{self._folder / part.file} has {size} bytes, but its part of the artifact ends "
                f"at {part.offset + part.num_bytes}; fetch it again."
            )
        return True

    def _require_ends(self) -> None:
        """No file has bytes after its last part, where something could hide."""
        ends = {part.file: part.offset + part.num_bytes for part in self._parts if part.num_bytes}
        for name, end in ends.items():
            if (size := self._files[name].size()) != end:
                raise ArtifactError(
                    f"{self._folder / name} has {size} bytes, but its part of the artifact ends at "
                    f"{end}; fetch it again, or cut off what was appended."
                )


def _read_sidecar(path: Path) -> Sidecar:
    source = FileSource(path)
    # One byte more than may be there is enough to be refused, however long the file is.
    raw = source.read(ByteRange(0, min(source.size(), MAX_SIDECAR_BYTES + 1)))
    source.close()
    return Sidecar.parse(raw)
