"""Files: one appears whole or not at all, on every system.

It is written under another name in the same folder, forced to disk, and then renamed over its
target in one step. What the cache and a resumed download need beyond that is in
:mod:`plyweight.artifact.posix`.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from plyweight.artifact.posix import cannot_write, sync_folder
from plyweight.errors import OutputError, PlyweightError

__all__ = ["publish_atomically", "resolve_target"]

# What writing to the temporary file itself can die of; other errors belong to whoever raised them.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


@contextlib.contextmanager
def publish_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends without an exception.

    On any exception, ``KeyboardInterrupt`` included, nothing is left behind and what stood at
    ``path`` stays as it was. A symbolic link at ``path`` is followed.

    Raises:
        OutputError: If the file cannot be written there.
    """
    target = resolve_target(path)
    # A short name of its own: the target's may already be as long as the system allows.
    temporary = target.parent / f".plyweight-{secrets.token_hex(8)}.part"
    try:
        file = temporary.open("xb+")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        try:
            yield file
        except PlyweightError:
            raise
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise cannot_write(path, error) from error
            raise
        try:
            file.flush()
            os.fsync(file.fileno())
            file.close()  # before the rename: Windows renames no open file
            temporary.replace(target)
        except OSError as error:
            raise cannot_write(path, error) from error
    except BaseException:
        # Closing flushes what is buffered, which may fail again on a full disk.
        with contextlib.suppress(OSError):
            file.close()
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """The absolute path of the file to write, symbolic links followed.

    Raises:
        OutputError: If no regular file can stand there.
    """
    try:
        target = Path(path).resolve()
        is_folder, has_folder = target.is_dir(), target.parent.is_dir()
        is_special = target.exists() and not is_folder and not target.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # an embedded NUL, a loop of links
        raise cannot_write(path, error) from error
    if is_folder:
        raise OutputError(f"{os.fspath(path)!r} is a folder; give the path of a file inside it.")
    if is_special:  # a device or pipe, which the rename would replace
        raise OutputError(
            f"{os.fspath(path)!r} is not a regular file; give the path of a file to write."
        )
    if not has_folder:
        raise OutputError(
            f"{os.fspath(path)} cannot be written: the folder {target.parent} does not "
            "exist; create it first."
        )
    return target
