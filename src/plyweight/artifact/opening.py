"""Opening: the source of what is on this machine, however it is named.

net.layered.safetensors      a file, whole or a prefix
net/  net/layers.json        the folder of a split artifact
a source of bytes            itself
"""

import contextlib
import os
from pathlib import Path
from typing import TypeGuard

from plyweight.artifact.parts import SplitSource
from plyweight.artifact.sidecar import SIDECAR_FILE
from plyweight.artifact.source import FileSource, Source
from plyweight.errors import SourceError, TrustError

__all__ = ["is_url", "open_source", "require_id", "split_folder"]


def is_url(address: object) -> TypeGuard[str]:
    """Whether that is an address of something elsewhere, not a path and not a source."""
    return isinstance(address, str) and "://" in address


def open_source(path_or_source: str | os.PathLike[str] | Source) -> Source:
    """The source itself, or that of a path.

    Raises:
        SourceError: If it is a URL, or a file that cannot be opened.
        ArtifactError: If it is a split artifact whose sidecar or header is wrong.
    """
    if isinstance(path_or_source, str | os.PathLike):
        path = os.fspath(path_or_source)
        if is_url(path):
            raise SourceError(
                f"{path.partition('?')[0]} is a URL, and files are read here; fetch it with "
                "`plyweight.fetch`, which verifies every layer that it brings."
            )
        folder = split_folder(path)
        return FileSource(path) if folder is None else SplitSource(folder)
    if not isinstance(path_or_source, Source):
        raise SourceError(
            f"a {type(path_or_source).__name__} was given; give the path of an artifact, or a "
            "source of bytes."
        )
    return path_or_source


def split_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of a split artifact, which may be named by its ``layers.json`` as well."""
    named = Path(path)
    if named.name == SIDECAR_FILE:
        return named.parent
    with contextlib.suppress(OSError):  # whoever opens the file says what is wrong with its path
        if (named / SIDECAR_FILE).is_file():
            return named
    return None


def require_id(name: object, found: str, wanted: str | None) -> None:
    """Refuse another artifact than the one that was asked for, if one was.

    Args:
        name: of where it is, for the message.
        found: the id of what is there.
        wanted: the id that it must have; None for any.

    Raises:
        TrustError: If it has another.
    """
    if wanted not in (None, found):
        raise TrustError(
            f"{name} is artifact {found}, but {wanted} was asked for; check the path and where the "
            "id is from."
        )
