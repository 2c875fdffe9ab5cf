"""Client: a prefix of an artifact, from a remote source to a cache or a file, verified.

    NEW ──► HEADER ──► TRUSTED ──► FETCH(0) ──► READY(0) ──► FETCH(1) ──► READY(1) ──► …
              ▲                       │
              └──── STALE ◄───────────┤ the object changed: begin again, once
             QUARANTINED ◄────────────┘ a chunk is wrong three times: nothing of it is published

What moves: the first MiB, of which nothing is asked for twice, and then what is missing. Once a
name is known (from ``refs``) or an id is pinned, its header is not asked for again:
missing layers are fetched from their places, and where nothing is missing nothing is asked; the
digests judge. So a name stands for the artifact it was trusted for until ``refresh``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from plyweight.artifact import Header, Source
from plyweight.artifact.reader import naming
from plyweight.delivery.filling import Destination
from plyweight.delivery.opening import Opened, Opener
from plyweight.delivery.pulling import Puller
from plyweight.delivery.refs import Ref, Refs, check_digest
from plyweight.delivery.retry import Patience
from plyweight.delivery.source import RemoteSource
from plyweight.delivery.transfer import Meter, Progress, Transfer
from plyweight.errors import LayeringError, OutputError, SourceError, StaleError, TrustError

__all__ = [
    "PATIENCE_S",
    "MAX_WASTE_BYTES",
    "Download",
    "FoundHeader",
    "Trust",
    "download",
    "read_header",
    "require_newer",
]

# As much as one wrong chunk may cost; a small model is sooner read again than refused.
MAX_WASTE_BYTES = 64 * 2**20
PATIENCE_S = 120.0
MAX_ROUNDS = 3  # of fetching what another process deletes meanwhile

Trust = Callable[[Header, Ref | None], None]
"""Judges a header, given what its name was last trusted for; raises ``TrustError`` to refuse."""


@dataclass(frozen=True)
class Download:
    """What came of it.

    Attributes:
        header: of the artifact.
        bit_width: that was chosen.
        artifact: to read it from; the source may hold more bits than were chosen.
        transfer: what was moved.
    """

    header: Header
    bit_width: int
    artifact: Source
    transfer: Transfer


def download(
    source: RemoteSource,
    *,
    choose: Callable[[Header], int],
    into: Destination,
    artifact_id: str | None = None,
    is_signed: bool = False,
    trust: Trust | None = None,
    refs: Refs | None = None,
    refresh: bool = False,
    verify: bool = False,
    allow_rollback: bool = False,
    parallel: int = 4,
    max_waste_bytes: int = MAX_WASTE_BYTES,
    patience_s: float = PATIENCE_S,
    progress: Callable[[Progress], None] | None = None,
) -> Download:
    """Fetch what is missing of the bit-width that ``choose`` names.

    Interrupted at any point, by Ctrl-C, a kill or a failure, it goes on there when it is called
    again; whatever is verified by then stays. Threads that it starts have ended when it returns or
    raises, but for those that wait for a silent server: they end with that wait, touching nothing.

    Args:
        source: to ask; it stays the caller's to close.
        choose: the bit-width, once the header is known and trusted.
        into: a :class:`~plyweight.delivery.cache.Cache` or a
            :class:`~plyweight.delivery.standing.StandingFile`.
        artifact_id: that the artifact must have; None for whatever the source has.
        is_signed: whether a signature vouches for that id: from then on the source's name stands
            for signed artifacts alone.
        trust: is asked before anything of the artifact is kept.
        refs: where the source's name is looked up and remembered (``Cache.refs``); None for a
            source whose name does not last, such as a path: its header is read every time.
        refresh: ask whether the name stands for something newer by now.
        verify: read what is here already, and fetch what is damaged.
        allow_rollback: accept an older revision, or another model, than the name stood for.
        parallel: requests at the same time; fewer where chunks are large.
        max_waste_bytes: that may be read and dropped where the source ignores byte ranges.
        patience_s: give up when nothing arrives for so long.
        progress: is called about ten times a second, in this thread.

    Raises:
        ArtifactError: If the header is wrong, or a layer differs from its digest.
        BitWidthError: If ``choose`` names one that is not stored.
        TrustError: If the artifact is not the pinned one, is refused by ``trust``, or is older.
        TransferError: If nothing arrives for ``patience_s``.
        StaleError: If the object changes again and again.
        SourceError: If the source refuses, ends too early, or would waste too much.
        OutputError: If it cannot be written.
        LayeringError: If ``parallel`` or the patience is not a positive number.
    """
    if type(parallel) is not int or parallel < 1:
        raise LayeringError(f"parallel is {parallel!r}; give an integer of 1 or more.")
    if artifact_id is not None:
        check_digest(artifact_id)
    meter, patience = Meter(), Patience(patience_s)
    session = _Session(
        source=source,
        choose=choose,
        into=into,
        artifact_id=artifact_id,
        is_signed=is_signed,
        trust=trust,
        refs=refs,
        verify=verify,
        allow_rollback=allow_rollback,
        parallel=parallel,
        max_waste_bytes=max_waste_bytes,
        progress=progress,
        meter=meter,
        patience=patience,
        opener=Opener(source, artifact_id, meter, patience),
    )
    return session.run(refresh=refresh)


@dataclass(frozen=True)
class FoundHeader:
    """A header, and how much its source has of what it describes.

    Attributes:
        name: of the source.
        header: of the artifact.
        total_bytes: that the source says its object has, which may be a prefix of the artifact;
            None where it does not say.
        transfer: what was moved.
    """

    name: str
    header: Header
    total_bytes: int | None
    transfer: Transfer


def read_header(
    source: RemoteSource, *, artifact_id: str | None = None, patience_s: float = PATIENCE_S
) -> FoundHeader:
    """The header alone, strictly parsed.

    Raises:
        ArtifactError: If it is wrong.
        TrustError: If it is not that of ``artifact_id``.
        DeliveryError: If it cannot be read.
    """
    meter = Meter()
    opener = Opener(source, artifact_id, meter, Patience(patience_s))
    with naming(source.name), opener.from_source() as opened:
        total = opened.stream.total_bytes if opened.stream is not None else None
        return FoundHeader(source.name, opened.header, total, meter.read())


@dataclass(frozen=True, kw_only=True)
class _Session:
    """One call of :func:`download`: its arguments, and what its parts share."""

    source: RemoteSource
    choose: Callable[[Header], int]
    into: Destination
    artifact_id: str | None
    is_signed: bool
    trust: Trust | None
    refs: Refs | None
    verify: bool
    allow_rollback: bool
    parallel: int
    max_waste_bytes: int
    progress: Callable[[Progress], None] | None
    meter: Meter
    patience: Patience
    opener: Opener

    def run(self, *, refresh: bool) -> Download:
        """From NEW to READY, beginning again once if the object changed."""
        seen_id = None
        try:
            opened = self.opener.from_memory(self.into, self._known(), refresh=refresh)
            if opened is not None:
                seen_id = opened.header.artifact_id
                return self._fetch(opened, identity=opened.identity)
            with self.opener.from_source() as opened:
                seen_id = opened.header.artifact_id
                return self._fetch(opened, identity=opened.identity)
        except StaleError:
            self.meter.retried()
        with self.opener.from_source() as opened:
            # Servers of one name may give the same bytes different ETags: the digests decide then.
            is_same = opened.header.artifact_id == seen_id
            return self._fetch(opened, identity=None if is_same else opened.identity)

    def _fetch(self, opened: Opened, *, identity: str | None) -> Download:
        """From HEADER to READY."""
        header = opened.header
        self._require_trusted(opened)
        if self.verify:
            self.into.repair(header.artifact_id)
        bit_width = self.choose(header)
        self._require_stored(opened, bit_width)
        self._remember(opened)  # not before: what is refused was not trusted for anything
        for number in range(MAX_ROUNDS):
            artifact = self.into.opened(header, bit_width)
            if artifact is None:
                artifact = self._fill(opened, bit_width, identity, is_first=number == 0)
            if artifact is not None:
                return Download(header, bit_width, artifact, self.meter.read())
        raise OutputError(
            f"{header.model.name} was fetched {MAX_ROUNDS} times, and was gone each time; another "
            "process deletes it, so stop that one first."
        )

    def _fill(
        self, opened: Opened, bit_width: int, identity: str | None, *, is_first: bool
    ) -> Source | None:
        """From TRUSTED to READY; None if it is gone again."""
        header, wait_s = opened.header, self.patience.patience_s
        with self.into.filling(opened.raw, header, bit_width, wait_s=wait_s) as filling:
            puller = Puller(
                self.source,
                header,
                bit_width,
                filling,
                identity=identity,
                meter=self.meter,
                patience=self.patience,
                parallel=self.parallel,
                max_waste_bytes=self.max_waste_bytes,
                rejected=lambda: self.opener.require_unchanged(header),
                progress=self.progress,
            )
            if is_first and opened.stream is not None:
                puller.pull_from(opened.rest, opened.stream, opened.close)
            else:
                puller.pull()
            return self.into.opened(header, bit_width)

    def _known(self) -> Ref | None:
        return self.refs.get(self.source.name) if self.refs is not None else None

    def _require_trusted(self, opened: Opened) -> None:
        """From HEADER to TRUSTED."""
        header, known = opened.header, self._known()
        if known is not None and self.artifact_id is None:
            require_signed_still(header, known)
            if not self.allow_rollback:
                require_newer(header, known)
        if self.trust is not None:
            self.trust(header, known)

    def _remember(self, opened: Opened) -> None:
        """Note what the name stands for, if the source itself has shown it, and that it is signed.

        A name that stood for a signed artifact goes on to be one of signed ones: a pin is a choice
        for one time.
        """
        if self.refs is None:
            return
        header, known = opened.header, self._known()
        model = header.model
        is_signed = self.is_signed or (known is not None and known.is_signed)
        if opened.stream is not None:
            name = self.source.name
            ref = Ref(
                name, header.artifact_id, model.name, model.revision, opened.identity, is_signed
            )
        elif known is not None and known.artifact_id == header.artifact_id:
            ref = replace(known, is_signed=is_signed)
        else:
            return
        # A pin is a choice for one time; it does not make an older revision good for all.
        is_older = known is not None and model.revision < known.revision
        if ref != known and not (self.artifact_id is not None and is_older):
            self.refs.put(ref)

    def _require_stored(self, opened: Opened, bit_width: int) -> None:
        """The artifact has that bit-width, and the source all of its bytes."""
        needed = opened.header.prefix_bytes(bit_width)
        total = opened.stream.total_bytes if opened.stream is not None else None
        if total is not None and total < needed:
            raise SourceError(
                f"{bit_width} bits need the first {needed} bytes, but {self.source.name} has "
                f"{total}; ask for fewer bits, or for the whole artifact to be published there."
            )


def require_signed_still(header: Header, known: Ref) -> None:
    """Refuse another artifact, unsigned, under a name that stood for a signed one.

    Raises:
        TrustError: If it is one.
    """
    if known.is_signed and header.artifact_id != known.artifact_id:
        raise TrustError(
            f"{known.name} had an artifact whose signature was verified, and has another one now; "
            "verify its signature too (public_key= or authorities=), or pin its id "
            f"({header.artifact_id})."
        )


def require_newer(header: Header, known: Ref) -> None:
    """Refuse what is older than, or something else than, what the name stood for.

    Raises:
        TrustError: If it is.
    """
    model = header.model
    if model.name != known.model:
        raise TrustError(
            f"{known.name} has {model.name} now, but it had {known.model}; if that is meant, pin "
            f"its id ({header.artifact_id}) or use `allow_rollback`."
        )
    if model.revision < known.revision:
        raise TrustError(
            f"{known.name} has revision {model.revision} of {model.name} now, but it had revision "
            f"{known.revision}; if that is meant, pin its id ({header.artifact_id}) or use "
            "`allow_rollback`."
        )
