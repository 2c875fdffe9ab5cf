"""Refs: what a name stood for when it was last trusted.

    refs/<sha256 of the name>      {"name", "artifact_id", "model", "revision", "identity",
                                    "is_signed"}

A name once trusted stands for that artifact until it is asked for anew, and then never for an
older revision: a server that shows yesterday's model, whose flaws are known, is refused.
"""

import contextlib
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

from plyweight.artifact import publish_atomically
from plyweight.artifact.posix import create_private_folder, read_private
from plyweight.errors import SourceError, TrustError

__all__ = ["Ref", "Refs", "check_digest", "is_digest"]

MAX_REF_BYTES = 2**16
DAMAGE = (SourceError, ValueError, KeyError, TypeError, RecursionError)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Ref:
    """What a name stood for when it was last trusted.

    Attributes:
        name: of the source, a URL mostly.
        artifact_id: that it had.
        model: name of the model.
        revision: of the model.
        identity: of the object (an ETag); None if its server gave none.
        is_signed: whether a signature was verified when it was trusted.
    """

    name: str
    artifact_id: str
    model: str
    revision: int
    identity: str | None
    is_signed: bool = False


class Refs:
    """A folder of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str) -> Ref | None:
        """What ``name`` stood for when it was last trusted; None if it never was.

        Raises:
            TrustError: If the note of it is damaged.
        """
        path = self._path(name)
        try:
            return _read(path)
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            raise TrustError(
                f"the note of what {name} was trusted for is damaged ({error}); delete {path} to "
                "trust whatever is there now."
            ) from error

    def knows(self, artifact_id: str) -> bool:
        """Whether some name stands for that artifact."""
        for path in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError, *DAMAGE):
                if _read(path).artifact_id == artifact_id:
                    return True
        return False

    def put(self, ref: Ref) -> None:
        """Note what a name stands for.

        Raises:
            OutputError: If it cannot be written.
        """
        for folder in (self._folder.parent, self._folder):
            create_private_folder(folder)
        with publish_atomically(self._path(ref.name)) as file:
            file.write(json.dumps(asdict(ref)).encode())

    def _path(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> Ref:
    fields = json.loads(read_private(path, most_bytes=MAX_REF_BYTES))
    return Ref(
        name=str(fields["name"]),
        artifact_id=check_digest(fields["artifact_id"]),
        model=str(fields["model"]),
        revision=int(fields["revision"]),
        identity=None if fields["identity"] is None else str(fields["identity"]),
        is_signed=bool(fields.get("is_signed", False)),
    )


def is_digest(value: object) -> TypeGuard[str]:
    """Whether it is 64 lower-case hexadecimal digits, which are safe in a path."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def check_digest(value: object) -> str:
    """An artifact id, once it is one.

    Raises:
        SourceError: If it is anything else.
    """
    if not is_digest(value):
        raise SourceError(
            f"the artifact id is {value!r:.100}; give its 64 hexadecimal digits, in lower case."
        )
    return value
