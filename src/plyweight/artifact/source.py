"""Sources: where an artifact's bytes come from.

A source answers two questions, how many bytes there are and which bytes stand in a range. It
returns exactly the bytes asked for or raises; the digests of the header judge what they are.
"""

import io
import os
import stat
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from plyweight.artifact.layout import ByteRange
from plyweight.errors import RangeError, SourceError

__all__ = ["FileSource", "MemorySource", "Source", "ViewSource"]


@runtime_checkable
class Source(Protocol):
    """Bytes with a name for messages."""

    @property
    def name(self) -> str:
        """What a message calls this source."""
        ...

    def size(self) -> int:
        """How many bytes there are."""
        ...

    def read(self, byte_range: ByteRange) -> bytearray:
        """Exactly the bytes of ``byte_range``, in a buffer of their own.

        Raises:
            RangeError: If a byte of the range is not there.
            SourceError: If the bytes cannot be read.
        """
        ...


@runtime_checkable
class ViewSource(Source, Protocol):
    """A source that large ranges are read from without a second pass over their memory."""

    def read_view(self, byte_range: ByteRange) -> memoryview:
        """As :meth:`read`, in writable memory that is not set to zero first."""
        ...


class FileSource:
    """A local file, whole or a prefix of an artifact.

    The file is held open, so that a file published under the same name meanwhile does not mix
    with this one; it is closed when the source is garbage collected or by :meth:`close`.

    Raises:
        SourceError: If there is no such regular file, or it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            # Asked before opening, because opening a pipe would wait for a writer.
            _require_regular(Path(self.path).stat().st_mode, self.path)
            self._file = io.FileIO(self.path)
        except FileNotFoundError as error:
            raise SourceError(
                f"{self.path} does not exist; check the path, or pack a model into it first."
            ) from error
        except PermissionError as error:
            raise SourceError(
                f"{self.path} may not be read; ask its owner for permission to read it."
            ) from error
        except SourceError:
            raise
        except (OSError, ValueError) as error:  # ValueError: an embedded NUL
            raise SourceError(f"{self.path!r} cannot be opened ({error}); check it.") from error
        self._finalizer = weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        status = os.fstat(self._file.fileno())
        _require_regular(status.st_mode, self.path)
        self._size = status.st_size

    @property
    def name(self) -> str:
        """The path, as it was given."""
        return self.path

    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._size

    def read(self, byte_range: ByteRange) -> bytearray:
        """Exactly the bytes of ``byte_range``."""
        _require_inside(byte_range, self._size, self.name)
        buffer = bytearray(byte_range.num_bytes)
        self._fill(byte_range, memoryview(buffer))
        return buffer

    def read_view(self, byte_range: ByteRange) -> memoryview:
        """The same, four times as fast where it is large: numpy asks for memory in huge pages."""
        _require_inside(byte_range, self._size, self.name)
        view = np.empty(byte_range.num_bytes, np.uint8).data
        self._fill(byte_range, view)
        return view

    def _fill(self, byte_range: ByteRange, view: memoryview) -> None:
        try:
            with self._lock:  # the position of the file is shared between threads
                self._file.seek(byte_range.start)
                done = _fill(self._file.readinto, view)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.name} cannot be read ({error}); open it again.") from error
        if done < len(view):
            raise SourceError(
                f"{self.name} lost bytes while it was read: {byte_range} was asked for, it ends at "
                f"{byte_range.start + done}; open it again."
            )

    def close(self) -> None:
        """Close the file; what was read stays valid."""
        self._finalizer()


@dataclass
class MemorySource:
    """An artifact in memory that remembers what was read from it."""

    data: bytes
    name: str = "memory"
    reads: list[ByteRange] = field(default_factory=list)

    def size(self) -> int:
        """Bytes of ``data``."""
        return len(self.data)

    def read(self, byte_range: ByteRange) -> bytearray:
        """Exactly the bytes of ``byte_range``."""
        _require_inside(byte_range, len(self.data), self.name)
        self.reads.append(byte_range)
        return bytearray(self.data[byte_range.start : byte_range.stop])


def _fill(readinto: "_ReadInto", view: memoryview) -> int:
    """Fill ``view`` by as many reads as it takes; how many bytes came before the end."""
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            break
        done += count
    return done


class _ReadInto(Protocol):
    def __call__(self, buffer: memoryview, /) -> int | None: ...


def _require_regular(mode: int, path: str) -> None:
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise SourceError(f"{path} is {kind}; give the path of an artifact's file.")


def _require_inside(byte_range: ByteRange, size: int, name: str) -> None:
    if not 0 <= byte_range.start <= byte_range.stop <= size:
        raise RangeError(
            f"bytes {byte_range} were asked for, but {name} has {size} bytes; ask inside those."
        )
