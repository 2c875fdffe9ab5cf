"""Replies: what an HTTP response holds, or why it is not believed.

    206  Content-Range: bytes 0-1048575/4200000   what was asked for, or less from the same start
    200  Content-Length: 4200000                  everything: the server ignores ranges
    anything else                                 TransferError, StaleError or SourceError

Nothing is read before it is asked for, and nothing beyond what the response says it holds.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from itertools import chain

from plyweight.artifact import ByteRange
from plyweight.delivery.source import Reply
from plyweight.errors import SourceError, StaleError, TransferError

try:
    import httpx2
except ImportError as error:
    raise ImportError(
        'reading from a web server needs httpx2; run: pip install "plyweight[http]"'
    ) from error

__all__ = ["Question", "is_transient", "retry_after"]

# Worth another attempt, besides every 5xx: time-out, too early, too many requests.
TRANSIENT = frozenset({408, 425, 429})
# How much of a reply of unknown length is read to find its end: more than a first request asks.
PEEK_BYTES = 2 * 2**20
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})", re.ASCII)
STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,200}"')


@dataclass(frozen=True)
class Question:
    """What was asked, by which a response is judged.

    Attributes:
        name: of the source, for messages.
        at: the name, and the host that answered if it is another one.
        byte_range: that was asked for.
        identity: that the object must have; None if any will do.
        is_authorized: whether a token was sent.
    """

    name: str
    at: str
    byte_range: ByteRange
    identity: str | None
    is_authorized: bool

    def judge(self, response: httpx2.Response) -> Reply:
        """What a reply holds.

        Raises:
            TransferError: If it contradicts itself or the request.
            StaleError: If it is of another object.
            SourceError: If it is a refusal.
        """
        if response.status_code not in (200, 206):
            raise self._refusal(response)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise TransferError(
                f"{self.name} answered in {encoding[:20]!r} though the bytes as they are were "
                "asked for; turn compression off for this path at the server."
            )
        found = _strong_etag(response)
        if self.identity is not None and found is not None and found != self.identity:
            raise self._is_stale(f"it was {self.identity}, and now it is {found}")
        if response.status_code == 206:
            return self._partial(response, found)
        return self._whole(response, found)

    def _partial(self, response: httpx2.Response, found: str | None) -> Reply:
        """A 206: exactly what was asked for, or less from the same start."""
        asked, stated = self.byte_range, response.headers.get("Content-Range", "")
        match = CONTENT_RANGE.fullmatch(stated)
        if match is None:
            raise TransferError(
                f"{self.name} answered a part without saying which; bytes {asked} were asked for."
            )
        got = ByteRange(int(match[1]), int(match[2]) + 1)
        total = None if match[3] == "*" else int(match[3])
        length = _content_length(response)
        if (
            got.start != asked.start
            or not asked.start < got.stop <= asked.stop
            or (total is not None and got.stop > total)
            or (length is not None and length < got.num_bytes)
        ):
            raise TransferError(
                f"{self.name} answered {stated!r} and sends {'some' if length is None else length} "
                f"bytes; bytes {asked} were asked for."
            )
        exact = length == got.num_bytes
        return Reply(got, total, found, self._body(response.iter_raw(), got, ends=exact))

    def _whole(self, response: httpx2.Response, found: str | None) -> Reply:
        """A 200: the server ignores ranges and gives everything.

        Where it does not say how much that is, and it is not soon over, ``byte_range`` ends where
        the range that was asked for does: so far the bytes must come.
        """
        pieces, total = response.iter_raw(), _content_length(response)
        exact = total is not None
        if total is None:
            pieces, total = self._peeked(pieces)
        if total is not None and total <= self.byte_range.start:
            raise self._ends_before(total)
        got = ByteRange(0, self.byte_range.stop if total is None else total)
        body = self._body(pieces, got, ends=exact)
        return Reply(got, total, found, body, has_ranges=False)

    def _peeked(self, pieces: Iterator[bytes]) -> tuple[Iterator[bytes], int | None]:
        """The same pieces, and how many bytes they are if they end soon."""
        held, size = [], 0
        with self._transfer_errors():
            for piece in pieces:
                held.append(piece)
                size += len(piece)
                if size > PEEK_BYTES:
                    return chain(held, pieces), None
        return iter(held), size

    def _body(self, pieces: Iterator[bytes], got: ByteRange, *, ends: bool) -> Iterator[bytes]:
        """The bytes of ``got`` and not one more; ``ends`` if the reply says it has no more."""
        missing = got.num_bytes
        with self._transfer_errors():
            for piece in pieces:
                if len(piece) >= missing:
                    if ends:
                        next(pieces, None)  # the end of the reply, so that the connection is kept
                    yield piece[:missing]
                    return
                missing -= len(piece)
                yield piece
        raise TransferError(f"{self.name} ended {missing} bytes early in bytes {got}; try again.")

    @contextmanager
    def _transfer_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TimeoutException as error:
            raise TransferError(f"{self.name} stopped sending; try again.") from error
        except httpx2.TransportError as error:
            raise TransferError(f"{self.name} broke off ({error}); try again.") from error

    # --- refusing -------------------------------------------------------------------------------

    def _refusal(self, response: httpx2.Response) -> SourceError | StaleError | TransferError:
        """What a status other than 200 and 206 means."""
        status = response.status_code
        answered = f"{self.at} answered {status}{_phrase(status)}"
        if is_transient(status):
            return TransferError(f"{answered}; try again.", retry_after_s=retry_after(response))
        if status == 412:
            return self._is_stale(f"it is not {self.identity} any more")
        if status == 416:
            match = UNSATISFIED.fullmatch(response.headers.get("Content-Range", ""))
            total = int(match[1]) if match else None
            if total is not None and total > self.byte_range.start:
                return TransferError(f"{answered} though it has {total} bytes; try again.")
            return self._ends_before(total)
        if status == 401:
            what = "refused the token" if self.is_authorized else "wants a token"
            return SourceError(f"{answered}: it {what}; give one that may read it.")
        if status == 403:
            return SourceError(f"{answered}: it may not be read; check the token and its rights.")
        if status in (404, 410):
            return SourceError(f"{answered}: there is nothing there; check the address.")
        return SourceError(
            f"{answered}, which is no answer to a range of bytes; check the address."
        )

    def _ends_before(self, total: int | None) -> SourceError | StaleError:
        """The range starts after the last byte; ``total`` is how many there are, if it is known."""
        if self.byte_range.start == 0 and self.identity is None:
            return SourceError(f"{self.name} is empty; publish the artifact there again.")
        has = "fewer" if total is None else total
        return self._is_stale(f"bytes {self.byte_range} were asked for, and it has {has}")

    def _is_stale(self, why: str) -> StaleError:
        return StaleError(f"{self.name} changed: {why}; begin again with its header.")


def is_transient(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in TRANSIENT or status >= 500


def _strong_etag(response: httpx2.Response) -> str | None:
    """The ETag if equal ETags mean equal bytes; a weak one and Last-Modified do not."""
    etag: str = response.headers.get("ETag", "")
    return etag if STRONG_ETAG.fullmatch(etag) else None


def _content_length(response: httpx2.Response) -> int | None:
    stated = response.headers.get("Content-Length", "")
    if "Transfer-Encoding" in response.headers or not re.fullmatch(r"[0-9]{1,18}", stated):
        return None
    return int(stated)


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds to wait, from a number of them or a date."""
    stated = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", stated):
        return float(stated)
    try:
        date = parsedate_to_datetime(stated)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _phrase(status: int) -> str:
    """The usual words for a status; those of the server are not repeated."""
    try:
        return f" ({HTTPStatus(status).phrase})"
    except ValueError:
        return ""
