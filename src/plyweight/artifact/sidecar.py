"""Sidecar: ``layers.json``, a small file that names every part of an artifact by its digest.

    {"artifact": "sha256:<id>", "header": {"file", "offset"}, "header_bytes", "layers":
     [{"bytes", "file", "offset", "sha256"}, ...], "revision", "schema": 1, "size"}

It says where the header and each layer lie: in files of their own (the split form), or in one. It
is what gets signed, because it is small and fixes every byte; and it says nothing that the header
does not say as well, so that whoever has the header needs no sidecar.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plyweight.artifact.fields import MAX_LAYER_BYTES, MAX_LAYERS
from plyweight.artifact.header import LENGTH_BYTES, MAX_HEADER_BYTES, Header
from plyweight.artifact.strict_json import (
    MAX_INTEGER,
    check_integer,
    check_keys,
    header_error,
    parse_json,
    shown,
    to_json,
)

__all__ = ["HEADER_FILE", "MAX_SIDECAR_BYTES", "SIDECAR_FILE", "Part", "Sidecar", "layer_file"]

SCHEMA = 1
MAX_SIDECAR_BYTES = 64 * 2**10
SIDECAR_FILE, HEADER_FILE = "layers.json", "header.bin"
WHAT = "layers.json"  # what a message calls it, whatever the file's name

# No separator, no leading dot: a name of a file in the sidecar's own folder and of nothing else.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"sha256:([0-9a-f]{64})")


def layer_file(index: int) -> str:
    """The name of layer ``index``'s file in the split form."""
    return f"layer-{index}.bin"


@dataclass(frozen=True)
class Part:
    """The header or a layer, and where it lies.

    Attributes:
        sha256: hexadecimal digest of its bytes; the artifact id, for the header.
        num_bytes: how many it has.
        file: name of the file that has them, in the folder of the sidecar.
        offset: of its first byte in that file.
    """

    sha256: str
    num_bytes: int
    file: str
    offset: int


@dataclass(frozen=True)
class Sidecar:
    """What ``layers.json`` says.

    Attributes:
        revision: of the model.
        header: the part from byte 0 to where the data starts.
        layers: the other parts, base first.
    """

    revision: int
    header: Part
    layers: tuple[Part, ...]

    @classmethod
    def of(cls, header: Header, *, file: str | None = None) -> "Sidecar":
        """The sidecar of an artifact: in the split form, or as the one file called ``file``.

        Raises:
            HeaderError: If ``file`` is no name that a sidecar may have.
        """
        if file is not None:
            _check_file(file)
        return cls(
            revision=header.model.revision,
            header=Part(header.artifact_id, header.data_start, file or HEADER_FILE, 0),
            layers=tuple(
                Part(
                    layer.sha256,
                    layer.byte_range.num_bytes,
                    file or layer_file(index),
                    layer.byte_range.start if file else 0,
                )
                for index, layer in enumerate(header.layers)
            ),
        )

    @classmethod
    def parse(cls, raw: bytes | bytearray | memoryview) -> "Sidecar":
        """Read untrusted bytes.

        Raises:
            HeaderError: If they are no sidecar that keeps to ``docs/format.md``.
        """
        if len(raw) > MAX_SIDECAR_BYTES:
            raise header_error(
                f"{WHAT} has {len(raw)} bytes", f"at most {MAX_SIDECAR_BYTES} are read"
            )
        try:
            text = bytes(raw).decode()
        except UnicodeDecodeError as error:
            raise header_error(f"{WHAT} is no UTF-8 ({error})", "JSON is") from error
        keys = ("schema", "artifact", "revision", "header_bytes", "size", "header", "layers")
        fields = check_keys(parse_json(text, WHAT), WHAT, keys)
        if fields["schema"] != SCHEMA or type(fields["schema"]) is not int:
            raise header_error(
                f"{WHAT} has schema {shown(fields['schema'])}",
                f"this reader knows {SCHEMA}",
                "install a newer plyweight",
            )
        layers = fields["layers"]
        if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
            raise header_error(
                f"the layers of {WHAT} are {shown(layers)}", f"there are 1 to {MAX_LAYERS}"
            )
        sidecar = cls(
            revision=check_integer(fields["revision"], f"the revision in {WHAT}", 0, MAX_INTEGER),
            header=_header_part(fields),
            layers=tuple(_layer_part(item, index) for index, item in enumerate(layers)),
        )
        ends: dict[str, int] = {}
        for part in sidecar.parts:
            if part.offset != ends.get(part.file, 0):
                raise header_error(
                    f"{WHAT} has a part at byte {part.offset} of {part.file}",
                    f"those before it end at {ends.get(part.file, 0)}",
                )
            ends[part.file] = part.offset + part.num_bytes
        size = check_integer(fields["size"], f"the size in {WHAT}", 0, MAX_INTEGER)
        if size != sidecar.size:
            raise header_error(f"{WHAT} says {size} bytes", f"its parts have {sidecar.size}")
        return sidecar

    def emit(self) -> bytes:
        """The bytes of the file, always the same for the same content."""
        value = {
            "schema": SCHEMA,
            "artifact": f"sha256:{self.artifact_id}",
            "revision": self.revision,
            "header_bytes": self.header.num_bytes,
            "size": self.size,
            "header": {"file": self.header.file, "offset": self.header.offset},
            "layers": [
                {
                    "sha256": part.sha256,
                    "bytes": part.num_bytes,
                    "file": part.file,
                    "offset": part.offset,
                }
                for part in self.layers
            ],
        }
        return to_json(value).encode() + b"\n"

    @property
    def artifact_id(self) -> str:
        """Hexadecimal sha256 of the header."""
        return self.header.sha256

    @property
    def parts(self) -> tuple[Part, ...]:
        """The header and the layers: put together, they are the artifact's one file."""
        return (self.header, *self.layers)

    @property
    def size(self) -> int:
        """Bytes of that file."""
        return sum(part.num_bytes for part in self.parts)

    def check(self, header: Header) -> None:
        """Check that this is the sidecar of the artifact with that header.

        Raises:
            HeaderError: If it is not.
        """
        true = Sidecar.of(header)
        for what, stated, found in [
            ("artifact", self.artifact_id, true.artifact_id),
            ("revision", self.revision, true.revision),
            ("header_bytes", self.header.num_bytes, true.header.num_bytes),
            ("number of layers", len(self.layers), len(true.layers)),
            *(
                (f"{name} of layer {index}", getattr(mine, name), getattr(its, name))
                for index, (mine, its) in enumerate(zip(self.layers, true.layers, strict=False))
                for name in ("sha256", "num_bytes")
            ),
        ]:
            if stated != found:
                raise header_error(
                    f"{WHAT} states as {what} {stated}",
                    f"the header of the artifact has {found}",
                    "fetch both from the same place, or split the artifact again",
                )


def _header_part(fields: Mapping[str, Any]) -> Part:
    where = check_keys(fields["header"], f"the header in {WHAT}", ("file", "offset"))
    match = _ID.fullmatch(fields["artifact"]) if isinstance(fields["artifact"], str) else None
    if match is None:
        raise header_error(
            f"the artifact of {WHAT} is {shown(fields['artifact'])}",
            "it must be 'sha256:' and 64 hexadecimal digits",
        )
    most = LENGTH_BYTES + MAX_HEADER_BYTES
    num_bytes = check_integer(fields["header_bytes"], f"header_bytes in {WHAT}", 0, most)
    return Part(match.group(1), num_bytes, *_place(where, f"the header in {WHAT}"))


def _layer_part(value: object, index: int) -> Part:
    what = f"layer {index} in {WHAT}"
    fields = check_keys(value, what, ("sha256", "bytes", "file", "offset"))
    digest = fields["sha256"]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise header_error(
            f"the digest of {what} is {shown(digest)}", "it must be 64 hexadecimal digits"
        )
    num_bytes = check_integer(fields["bytes"], f"the size of {what}", 0, MAX_LAYER_BYTES)
    return Part(digest, num_bytes, *_place(fields, what))


def _place(fields: Mapping[str, Any], what: str) -> tuple[str, int]:
    file = _check_file(fields["file"], what)
    return file, check_integer(fields["offset"], f"the offset of {what}", 0, MAX_INTEGER)


def _check_file(file: object, what: str = WHAT) -> str:
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise header_error(
            f"the file of {what} is called {shown(file)}",
            "names have 1 to 128 of A-Z a-z 0-9 . _ - and start with a letter or digit",
        )
    return file
