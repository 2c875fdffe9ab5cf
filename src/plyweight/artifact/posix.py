"""What only POSIX gives: the one place for what the cache and a resumed download rest on.

Descriptors that nobody else can have put there, writes at a place, holes, maps, locks. Where the
system is another one (Windows), this refuses in one sentence. Whatever reads a whole local file
needs none of it.
"""

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from plyweight.errors import OutputError, SourceError

__all__ = [
    "POSIX",
    "append",
    "cannot_write",
    "create_private_folder",
    "fill_from",
    "free_bytes",
    "map_file",
    "open_private",
    "open_to_fill",
    "publish_descriptor",
    "read_private",
    "require_posix",
    "set_size",
    "sync_folder",
    "try_lock",
    "write_at",
]

POSIX = os.name == "posix"
HAS_PREADV = hasattr(os, "preadv")
PIECE_BYTES = 2**18  # of one read that is copied: it stays in a core's cache until then
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def require_posix(what: str) -> None:
    """Refuse ``what``, a clause of a sentence, where the system is not POSIX.

    Raises:
        OutputError: If it is not.
    """
    if not POSIX:
        raise OutputError(
            f"{what} is not supported on {os.name!r}, which lacks what keeps a download whole "
            "there; fetch the file by other means: reading whole local files works."
        )


def create_private_folder(folder: Path) -> None:
    """A folder of mode 0700 that is ours, created where it is missing.

    Raises:
        OutputError: If it cannot be created, belongs to somebody else, or others may write in it.
    """
    require_posix("keeping a cache")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise cannot_write(folder, error) from error
    if status.st_uid != os.getuid():
        raise OutputError(
            f"{folder} belongs to user {status.st_uid} and not to you ({os.getuid()}); choose "
            "another folder for the cache."
        )
    if status.st_mode & OTHERS_MAY_WRITE:
        raise OutputError(
            f"others may write in {folder}, and could replace what is verified there; run "
            f"`chmod 700 {folder}`, or choose another folder for the cache."
        )


def open_private(path: Path, *, size: int | None = None) -> int:
    """A descriptor for reading a file that nobody else can have put there; the caller closes it.

    Args:
        path: of a regular file, no symbolic link, with one name, that is ours.
        size: it must have, in bytes; None for any.

    Raises:
        FileNotFoundError: If there is no such file.
        SourceError: If it is not such a file, or cannot be opened.
    """
    require_posix("reading from a cache")
    # O_NONBLOCK: a pipe in its place is refused below instead of waited for.
    descriptor = _open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = _require_private(descriptor, path)
        if size is not None and found != size:
            raise SourceError(
                f"{path} has {found} bytes instead of {size}; delete it and fetch it again."
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_private(path: Path, *, most_bytes: int) -> bytes:
    """A small file that nobody else can have put there.

    Raises:
        FileNotFoundError: If there is no such file.
        SourceError: If it is longer, not such a file, or cannot be read.
    """
    descriptor = open_private(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > most_bytes:
            raise SourceError(
                f"{path} has {size} bytes instead of at most {most_bytes}; delete it."
            )
        data = bytearray(size)
        return bytes(data[: fill_from(descriptor, data, 0)])
    finally:
        os.close(descriptor)


def open_to_fill(path: Path, *, flags: int = os.O_CREAT, mode: int = 0o600) -> int:
    """A descriptor for reading and writing a file that is ours; the caller closes it.

    Args:
        path: of a regular file, no symbolic link, with one name; or of none.
        flags: of ``os.open``: whether it is created, may exist already, or is appended to.
        mode: of the file if it is created.

    Raises:
        SourceError: If what stands there is not such a file.
        OutputError: If it is not there and cannot be created.
    """
    require_posix("fetching into a cache or a resumable file")
    try:
        descriptor = _open(path, os.O_RDWR | os.O_NONBLOCK | flags, mode)
    except FileNotFoundError as error:
        raise cannot_write(path, error) from error
    try:
        _require_private(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, whoever else writes through that descriptor.

    Raises:
        OutputError: If the disk is full or fails.
    """
    view = memoryview(data)
    with _writing():
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count


def append(descriptor: int, data: bytes) -> None:
    """Write ``data``, a short line, after whatever is in the file by now.

    Args:
        descriptor: opened with ``os.O_APPEND``.
        data: so short that it is written at once.

    Raises:
        OutputError: If the disk is full or fails.
    """
    with _writing():
        os.write(descriptor, data)


def set_size(descriptor: int, num_bytes: int) -> None:
    """Give a new file its size: a hole, which takes no space until it is written to.

    Raises:
        OutputError: If the file system cannot hold such a file.
    """
    with _writing():
        os.ftruncate(descriptor, num_bytes)


def fill_from(descriptor: int, buffer: bytearray | memoryview, offset: int) -> int:
    """Fill ``buffer`` with the bytes at ``offset``; how many there were before the file's end.

    Raises:
        SourceError: If the disk fails.
    """
    view, done = memoryview(buffer), 0
    try:
        while done < len(view):
            rest, position = view[done:], offset + done
            if HAS_PREADV:
                count = os.preadv(descriptor, [rest], position)
            else:  # macOS
                piece = os.pread(descriptor, min(len(rest), PIECE_BYTES), position)
                count = len(piece)
                rest[:count] = piece
            if not count:
                break
            done += count
    except OSError as error:
        raise SourceError(f"reading failed ({error.strerror or error}); try again.") from error
    return done


def free_bytes(folder: Path) -> int:
    """How many bytes we may still write into ``folder``.

    Raises:
        OutputError: If there is no such folder.
    """
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return status.f_bavail * status.f_frsize


def map_file(descriptor: int, num_bytes: int) -> memoryview:
    """The first ``num_bytes`` of a file as memory, valid when the descriptor is closed.

    What is written to that memory stays in it and never reaches the file. The file must not be cut
    while a view of it lives, because touching what is gone ends the process.

    Raises:
        SourceError: If it cannot be mapped.
    """
    require_posix("mapping from a cache")
    if not num_bytes:
        return memoryview(b"")
    try:
        return memoryview(mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:  # ValueError: the file is shorter
        raise SourceError(f"{num_bytes} bytes cannot be mapped ({error}); read them.") from error


def publish_descriptor(descriptor: int, path: Path, target: Path, *, mode: int) -> bool:
    """Force a filled file to disk and give it its last name; whether this call did so.

    It did not if ``path`` is gone, because another process that filled the same file was first.

    Raises:
        OutputError: If it cannot be done.
    """
    try:
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
        path.replace(target)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise cannot_write(target, error) from error
    sync_folder(target.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Make the renames in ``folder`` survive a power cut, where the system can."""
    if not POSIX:
        return
    # The file is published by now; a file system that cannot sync a folder is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Take the advisory lock that ``path`` stands for; a descriptor to close, None if it is taken.

    Where the file system has no locks, everybody gets one: a lock saves work, and is never what
    makes a file right.

    Raises:
        SourceError: If what stands there is not our file.
        OutputError: If it cannot be created.
    """
    import fcntl  # there is none on Windows

    descriptor = open_to_fill(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"writing failed ({error.strerror or error}); what was verified before is kept, so "
            "free some space and run it again."
        ) from error


def _open(path: Path, flags: int, mode: int = 0o600) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SourceError(
                f"{path} is a symbolic link, which somebody else may turn; delete it."
            ) from error
        if flags & os.O_RDWR:
            raise cannot_write(path, error) from error
        raise SourceError(
            f"{path} cannot be opened ({error.strerror}); delete it and fetch it again."
        ) from error


def _require_private(descriptor: int, path: Path) -> int:
    """Bytes of an open file, once it is regular, ours and has one name."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path} is not a regular file; delete it.")
    if status.st_uid != os.getuid():
        raise SourceError(
            f"{path} belongs to user {status.st_uid} and not to you ({os.getuid()}), who could "
            "change it while it is read; delete it and fetch it again."
        )
    if status.st_nlink > 1:  # 0 if it was evicted in this moment: what is open stays readable
        raise SourceError(
            f"{path} has {status.st_nlink} names, so it can be changed under another one; delete "
            "it and fetch it again."
        )
    return status.st_size


def cannot_write(path: str | os.PathLike[str], error: Exception) -> OutputError:
    """What to raise where ``error`` keeps ``path`` from being written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(
        f"{os.fspath(path)!r} cannot be written ({reason}); nothing was left behind, "
        "so free the space or choose another folder and try again."
    )
