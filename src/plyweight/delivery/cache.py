"""Cache: verified layers on disk, each once, whoever uses them.

    blobs/sha256/<digest>          a whole layer, read-only
    artifacts/<id>/header          the header that names them
    artifacts/<id>/<layer>.*       a layer that is being filled
    refs/                          what names stand for: see ``refs``

A layer appears by rename and goes by unlink, and is never changed or cut in between. So whoever has
it open or mapped keeps it, whatever is evicted or fetched meanwhile. Names of files are digests and
numbers alone; nothing that a server or a header says becomes part of a path.
"""

import contextlib
import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plyweight.artifact import MAX_HEADER_BYTES, ByteRange, Header, publish_atomically
from plyweight.artifact.header import LENGTH_BYTES
from plyweight.artifact.posix import (
    create_private_folder,
    fill_from,
    map_file,
    open_private,
    read_private,
    require_posix,
    try_lock,
)
from plyweight.delivery.filling import Filling, hold_lock, require_space
from plyweight.delivery.partial import Partial, remove_partials
from plyweight.delivery.refs import Refs, check_digest, is_digest
from plyweight.errors import ArtifactError, OutputError, RangeError, SourceError

__all__ = ["Cache", "CachedArtifact", "CachedEntry", "default_folder"]

BLOB_MODE = 0o400
ANY_SIZE = 2**63


@dataclass(frozen=True)
class CachedEntry:
    """One line of a listing.

    Attributes:
        artifact_id: of the artifact.
        model: whose weights it has.
        revision: of the model.
        bit_widths: that are held.
        num_bytes: of the header and the layers held.
    """

    artifact_id: str
    model: str
    revision: int
    bit_widths: tuple[int, ...]
    num_bytes: int


class CachedArtifact:
    """The first layers of a cached artifact, as one file that ends where the last of them does.

    The layers are held open: they can be read until it is closed or garbage collected, even if
    they are evicted. What they hold is judged by whoever reads them, against the header's digests.

    Attributes:
        name: for messages.
        header: of the artifact.
        layers: those that are held, base first.

    Args:
        header: of the artifact.
        raw: its bytes.
        descriptors: of the layers, base first; -1 for one without bytes.
        copy: whether :meth:`read_view` reads instead of mapping.
    """

    def __init__(
        self, header: Header, raw: bytes, descriptors: Sequence[int], *, copy: bool
    ) -> None:
        self.name = f"{header.model.name} ({header.artifact_id[:12]} in the cache)"
        self.header = header
        self._raw, self._descriptors, self._copy = raw, tuple(descriptors), copy
        self.layers = header.layers[: len(descriptors)]
        self._finalizer = weakref.finalize(self, _close_all, self._descriptors)

    def size(self) -> int:
        """Bytes of the header and the layers that are held."""
        return self.layers[-1].byte_range.stop

    def read(self, byte_range: ByteRange) -> bytearray:
        """Exactly the bytes of ``byte_range``, counted from the first byte of the artifact.

        Raises:
            RangeError: If a byte of the range is not there.
            SourceError: If the bytes cannot be read.
        """
        self._require_inside(byte_range)
        buffer = bytearray(byte_range.num_bytes)
        self._fill(memoryview(buffer), byte_range)
        return buffer

    def read_view(self, byte_range: ByteRange) -> memoryview:
        """As :meth:`read`, without a copy where the range lies in one layer: it is mapped then.

        The memory may be written to, which changes no file, and stays valid after :meth:`close`.
        """
        self._require_open()
        for layer, descriptor in zip(self.layers, self._descriptors, strict=True):
            start, stop = layer.byte_range.start, layer.byte_range.stop
            if not self._copy and start <= byte_range.start < byte_range.stop <= stop:
                inside = byte_range.shifted(-start)
                return map_file(descriptor, stop - start)[inside.start : inside.stop]
        self._require_inside(byte_range)
        view = np.empty(byte_range.num_bytes, np.uint8).data  # not set to zero first
        self._fill(view, byte_range)
        return view

    def close(self) -> None:
        """Close the files; what was read or mapped stays valid."""
        self._finalizer()

    def _fill(self, view: memoryview, byte_range: ByteRange) -> None:
        head = self._raw[byte_range.start : byte_range.stop]
        view[: len(head)] = head
        self._require_open()
        for layer, descriptor in zip(self.layers, self._descriptors, strict=True):
            start = max(byte_range.start, layer.byte_range.start)
            stop = min(byte_range.stop, layer.byte_range.stop)
            if start >= stop:
                continue
            part = view[start - byte_range.start : stop - byte_range.start]
            if fill_from(descriptor, part, start - layer.byte_range.start) < len(part):
                raise SourceError(
                    f"a layer of {self.name} was cut by somebody else; evict the artifact and "
                    "fetch it again."
                )

    def _require_inside(self, byte_range: ByteRange) -> None:
        if not 0 <= byte_range.start <= byte_range.stop <= self.size():
            raise RangeError(
                f"bytes {byte_range} were asked for, but {self.name} has {self.size()} bytes; "
                "ask inside those."
            )

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise SourceError(f"{self.name} is closed; open it again.")


class Cache:
    """A folder of verified layers; any number of processes and threads may use it.

    Attributes:
        folder: where it is.
        refs: what names of sources stand for.

    Args:
        folder: by default ``$PLYWEIGHT_CACHE``, else ``$XDG_CACHE_HOME/plyweight``, else
            ``~/.cache/plyweight``. It is created when something is put into it.
        copy: read layers into memory instead of mapping them. For folders on network file systems,
            where another machine could cut a file that is mapped here, which ends the process.

    Raises:
        OutputError: If the system cannot keep a cache, or ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, copy: bool = False) -> None:
        require_posix("keeping a cache")
        self._copy = copy
        self.folder = Path(folder) if folder is not None else default_folder()
        if os.path.isfile(self.folder):  # noqa: PTH113 (`Path` raises where it may not look)
            raise OutputError(f"{self.folder} is not a folder; choose another one for the cache.")
        self._artifacts = self.folder / "artifacts"
        self._blobs = self.folder / "blobs" / "sha256"
        self.refs = Refs(self.folder / "refs")

    # --- reading ---

    def raw_header(self, artifact_id: str) -> bytes | None:
        """The header of that artifact if it is here, verified; None if it is not."""
        path = self._artifacts / check_digest(artifact_id) / "header"
        try:
            raw = read_private(path, most_bytes=LENGTH_BYTES + MAX_HEADER_BYTES)
        except (FileNotFoundError, SourceError):
            return None  # what is not ours is as good as missing, and replaced when it is fetched
        return raw if hashlib.sha256(raw).hexdigest() == artifact_id else None

    def open(self, artifact_id: str, bit_width: int | None = None) -> CachedArtifact:
        """The artifact up to ``bit_width``, or to the widest that is held.

        Raises:
            SourceError: If it is not held, or what stands there is not ours.
            BitWidthError: If the artifact has no such bit-width.
        """
        raw = self.raw_header(artifact_id)
        header = Header.parse(raw) if raw else None
        held = self._held(header) if header else 0
        if raw is None or header is None or not held:
            raise SourceError(f"artifact {artifact_id} is not in {self.folder}; fetch it first.")
        wanted = held if bit_width is None else len(header.layers_for(bit_width))
        if wanted > held:
            raise SourceError(
                f"{bit_width} bits of artifact {artifact_id} were asked for, but {self.folder} "
                f"has only its first {header.bit_widths[held - 1]}; fetch the others."
            )
        return self._open(raw, header, wanted)

    def opened(self, header: Header, bit_width: int) -> CachedArtifact | None:
        """The artifact up to ``bit_width``; None if some of it is missing or not ours."""
        try:
            return self.open(header.artifact_id, bit_width)
        except SourceError:
            return None

    def artifacts(self) -> tuple[CachedEntry, ...]:
        """What is here, for people."""
        entries = []
        for artifact_id, header in self._headers():
            held = header.layers[: self._held(header)]
            entries.append(
                CachedEntry(
                    artifact_id,
                    header.model.name,
                    header.model.revision,
                    tuple(layer.bit_width for layer in held),
                    held[-1].byte_range.stop if held else header.data_start,
                )
            )
        return tuple(entries)

    @property
    def num_bytes(self) -> int:
        """What the folder takes on the disk, half-filled layers included."""
        files = (path.lstat() for path in self.folder.rglob("*") if path.is_file())
        return sum(status.st_blocks * 512 for status in files)

    # --- filling and evicting ---

    @contextlib.contextmanager
    def filling(
        self, raw: bytes, header: Header, bit_width: int, *, wait_s: float
    ) -> Iterator[Filling]:
        """What is missing here of ``bit_width``."""
        folder = self._artifacts / header.artifact_id
        for path in (self.folder, self._artifacts, folder, self._blobs.parent, self._blobs):
            create_private_folder(path)
        if self.raw_header(header.artifact_id) is None:
            with publish_atomically(folder / "header") as file:
                file.write(raw)

        def progress() -> int:
            return sum(_size(path) for path in folder.glob("*.journal"))

        with contextlib.ExitStack() as stack:
            stack.enter_context(hold_lock(folder / "lock", progress, wait_s=wait_s))
            partials = {}
            for index, layer in enumerate(header.layers_for(bit_width)):
                if layer.byte_range.num_bytes and not self._has(layer.sha256, layer.byte_range):
                    target, stem = self._blobs / layer.sha256, folder / str(index)
                    partial = Partial(
                        target, stem, header=header, layers=[index], published_mode=BLOB_MODE
                    )
                    partials[index] = stack.enter_context(contextlib.closing(partial))
            filling = Filling(partials)
            require_space(self.folder, filling.missing_bytes, f"{bit_width} bits")
            filling.publish_complete()
            yield filling

    def evict(self, artifact_id: str, *, keep_bit_width: int | None = None) -> int:
        """Delete the layers above ``keep_bit_width``, or the whole artifact; bytes that were freed.

        Layers that another cached artifact names stay. Whoever has a layer open keeps it. What a
        name was trusted for is remembered.

        Raises:
            BitWidthError: If the artifact has no such bit-width.
        """
        folder = self._artifacts / check_digest(artifact_id)
        raw = self.raw_header(artifact_id)
        if raw is None:
            return 0
        header = Header.parse(raw)
        kept = len(header.layers_for(keep_bit_width)) if keep_bit_width is not None else 0
        named = {layer.sha256 for layer in header.layers[:kept]}
        for other_id, other in self._headers():
            if other_id != artifact_id:
                named.update(layer.sha256 for layer in other.layers)
        if not kept:
            (folder / "header").unlink(missing_ok=True)
        freed = 0
        for index, layer in enumerate(header.layers[kept:], kept):
            remove_partials(folder / str(index), ANY_SIZE)
            if layer.sha256 not in named:
                freed += self._delete(layer.sha256)
        if not kept:
            _remove_unused(folder)
        return freed

    def repair(self, artifact_id: str) -> tuple[int, ...]:
        """Read all held layers, and delete those that differ from their digest; their indices."""
        try:
            held = self.open(artifact_id)
        except SourceError:
            return ()  # nothing of it is held
        with contextlib.closing(held) as artifact:
            wrong = []
            for index, layer in enumerate(artifact.layers):
                digest = hashlib.sha256(artifact.read_view(layer.byte_range)).hexdigest()
                if digest != layer.sha256:
                    wrong.append(index)
                    self._delete(layer.sha256)
        return tuple(wrong)

    # --- inside ---

    def _headers(self) -> Iterator[tuple[str, Header]]:
        """The artifacts whose header is here and right."""
        names = [path.name for path in self._artifacts.glob("*") if is_digest(path.name)]
        for artifact_id in sorted(names):
            with contextlib.suppress(ArtifactError):
                if raw := self.raw_header(artifact_id):
                    yield artifact_id, Header.parse(raw)

    def _held(self, header: Header) -> int:
        """How many first layers are here; one without bytes is, as soon as those before it are."""
        for index, layer in enumerate(header.layers):
            if layer.byte_range.num_bytes and not self._has(layer.sha256, layer.byte_range):
                return index
        return len(header.layers)

    def _has(self, digest: str, byte_range: ByteRange) -> bool:
        try:
            os.close(open_private(self._blobs / digest, size=byte_range.num_bytes))
        except (FileNotFoundError, SourceError):
            return False  # what is not ours is replaced, by rename
        return True

    def _open(self, raw: bytes, header: Header, num_layers: int) -> CachedArtifact:
        descriptors: list[int] = []
        try:
            for layer in header.layers[:num_layers]:
                size = layer.byte_range.num_bytes  # without bytes there is no file
                path = self._blobs / layer.sha256
                descriptors.append(open_private(path, size=size) if size else -1)
        except FileNotFoundError as error:  # evicted in this moment
            _close_all(descriptors)
            raise SourceError(
                f"{error.filename} is gone from the cache; fetch it again."
            ) from error
        except BaseException:
            _close_all(descriptors)
            raise
        return CachedArtifact(header, raw, descriptors, copy=self._copy)

    def _delete(self, digest: str) -> int:
        path = self._blobs / digest
        freed = _size(path)
        path.unlink(missing_ok=True)
        return freed


def default_folder() -> Path:
    """Where the cache is if nobody says so."""
    if folder := os.environ.get("PLYWEIGHT_CACHE"):
        return Path(folder)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification of that variable says that a relative path is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "plyweight"


def _remove_unused(folder: Path) -> None:
    """Delete the folder of an evicted artifact, unless somebody fills it again."""
    with contextlib.suppress(OSError):
        if (lock := try_lock(folder / "lock")) is not None:
            for path in folder.glob(".plyweight-*.part"):  # headers whose writer was killed
                path.unlink(missing_ok=True)
            (folder / "lock").unlink(missing_ok=True)
            os.close(lock)
            folder.rmdir()


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
