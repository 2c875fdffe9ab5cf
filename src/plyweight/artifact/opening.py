"""Opening: the source of what is on this machine, however it is named.

net.layered.safetensors      a file, whole or a prefix
net/  net/layers.json        the folder of a split artifact
a source of bytes            itself
"""

import contextlib
import os
from pathlib import Path

from plyweight.artifact.parts import SplitSource
from plyweight.artifact.sidecar import SIDECAR_FILE
from plyweight.artifact.source import FileSource, Source
from plyweight.errors import SourceError

__all__ = ["open_source", "split_folder"]


def open_source(path_or_source: str | os.PathLike[str] | Source) -> Source:
    """The source itself, or that of a path.

    Raises:
        SourceError: If it is a URL, or a file that cannot be opened.
        ArtifactError: If it is a split artifact whose sidecar or header is wrong.
    """
    if isinstance(path_or_source, str | os.PathLike):
        path = os.fspath(path_or_source)
        if "://" in path:
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
