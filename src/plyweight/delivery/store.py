"""Object stores: one GET of one range, through obstore.

    s3://bucket/path/in/bucket       AWS_*        and whatever speaks S3: MinIO, R2, Ceph
    gs://bucket/path/in/bucket       GOOGLE_*
    az://container/path/in/container AZURE_*      AZURE_STORAGE_ACCOUNT_NAME says whose

Credentials, endpoint and region come from the environment, by the names that obstore reads:
``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``AWS_SKIP_SIGNATURE=true`` for a public bucket,
``AWS_ALLOW_HTTP=true`` for one that speaks plain http.
"""

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from plyweight.artifact import ByteRange
from plyweight.delivery.source import Reply
from plyweight.errors import SourceError, StaleError, TransferError

try:
    import obstore
    from obstore.exceptions import (
        BaseError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )
    from obstore.store import from_url
except ImportError as error:
    raise ImportError(
        'reading from an object store needs obstore; run: pip install "plyweight[cloud]"'
    ) from error

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import ClientConfig

__all__ = ["StoreSource"]

PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}  # of their variables in the environment
# obstore's own limit is 30 s for a whole request, however many bytes it brings.
TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "1day"}
# What is given to obstore here takes the place of these variables, so they are read for it.
CLIENT_VARIABLES = (
    "ALLOW_HTTP",
    "ALLOW_INVALID_CERTIFICATES",
    "CONNECT_TIMEOUT",
    "PROXY_CA_CERTIFICATE",
    "PROXY_EXCLUDES",
    "PROXY_URL",
    "READ_TIMEOUT",
    "ROOT_CERTIFICATE",
    "TIMEOUT",
    "USER_AGENT",
)
PIECE_BYTES = 2**20
TRANSIENT = frozenset({408, 425, 429})
STATUS = re.compile(r"status code: (\d{3})")
# What is asked for credentials when the environment gives none: a machine in a cloud has them.
METADATA = re.compile(r"//169\.254\.|//metadata\.google\.internal|/latest/(?:api/token|meta-data)")


class StoreSource:
    """An object in an object store.

    Args:
        url: scheme, bucket and the key as it is, without percent signs for its characters.

    Raises:
        SourceError: If the address is none, or the environment contradicts itself.
    """

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        bucket, _, self._key = rest.partition("/")
        if scheme not in PREFIXES or not bucket or "@" in bucket or not self._key.strip("/"):
            raise SourceError(
                "the address is not like s3://bucket/path, gs://bucket/path or "
                "az://container/path; check it, and give credentials by the environment."
            )
        self._name, self._prefix = url, PREFIXES[scheme]
        try:
            self._store = from_url(
                f"{scheme}://{bucket}",
                client_options=self._client_options(),
                retry_config={"max_retries": 0},  # the client tries again, and knows until when
            )
        except (BaseError, ValueError) as error:
            raise SourceError(
                f"{url} cannot be opened ({_reason(error)}); check the address and the variables "
                f"{self._prefix}_* of the environment."
            ) from None

    @property
    def name(self) -> str:
        """The address."""
        return self._name

    @contextmanager
    def get(self, byte_range: ByteRange, *, identity: str | None = None) -> Iterator[Reply]:
        """Ask once for ``byte_range``."""
        options: GetOptions = {"range": (byte_range.start, byte_range.stop)}
        if identity is not None:
            # An identity that is no ETag is the number of a version, which can be asked for.
            options["if_match" if identity.startswith('"') else "version"] = identity
        with self._errors(byte_range, identity):
            result = obstore.get(self._store, self._key, options=options)
        if "Content-Encoding" in result.attributes:
            raise SourceError(
                f"{self.name} is stored in {result.attributes['Content-Encoding']!r}; publish the "
                "file there as it is."
            )
        etag, version = result.meta["e_tag"], result.meta["version"]
        found = etag if etag is not None and etag.startswith('"') else version
        if None not in (identity, found) and identity != found:
            raise self._is_stale(f"it was {identity}, and now it is {found}")
        got = ByteRange(*result.range)
        body = self._body(result, got)
        try:
            yield Reply(got, result.meta["size"], found, body)
        finally:
            body.close()  # and with it the connection, if bytes are left in it

    def close(self) -> None:
        """Nothing to do: obstore closes connections that are idle."""

    def _body(self, result: "GetResult", got: ByteRange) -> Generator[bytes, None, None]:
        """The bytes of ``got`` and not one more."""
        missing = got.num_bytes
        with self._errors(got, None):
            for piece in result.stream(min_chunk_size=PIECE_BYTES):
                yield piece[:missing]
                missing -= len(piece)
                if missing <= 0:
                    return
        raise TransferError(f"{self.name} ended {missing} bytes early in bytes {got}; try again.")

    def _client_options(self) -> "ClientConfig":
        options = dict(TIMEOUTS)
        for name in CLIENT_VARIABLES:
            value = os.environ.get(f"{self._prefix}_{name}")
            if value is not None:
                options[name.lower()] = value
        return cast("ClientConfig", options)  # obstore reads strings as what they stand for

    @contextmanager
    def _errors(self, asked: ByteRange, identity: str | None) -> Iterator[None]:
        """Errors of obstore as ours. Theirs are not chained: they repeat requests and answers."""
        try:
            yield
        except FileNotFoundError:
            raise SourceError(
                f"{self.name} is not there; check the address, and the endpoint and region in the "
                f"variables {self._prefix}_* of the environment."
            ) from None
        except PreconditionError:
            raise self._is_stale(f"it is not {identity} any more") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise SourceError(
                f"{self.name} may not be read ({_reason(error)}); check the credentials in the "
                f"variables {self._prefix}_* of the environment."
            ) from None
        except ValueError as error:
            raise SourceError(f"{self.name} names no object ({error}); check the key.") from None
        except BaseError as error:
            raise self._other(error, asked, identity) from None

    def _other(
        self, error: BaseError, asked: ByteRange, identity: str | None
    ) -> SourceError | StaleError | TransferError:
        """What an error is that obstore has no class for."""
        reason = _reason(error)
        if METADATA.search(reason):
            return SourceError(
                f"there are no credentials for {self.name}; set {self._prefix}_* in the "
                f"environment, or {self._prefix}_SKIP_SIGNATURE=true if everybody may read it."
            )
        if "builder error" in reason:  # nothing was sent, and nothing ever would be
            return SourceError(
                f"{self.name} cannot be asked for: its endpoint is no https address; check it, or "
                f"set {self._prefix}_ALLOW_HTTP=true if it may be plain http."
            )
        match = STATUS.search(reason)
        status = int(match[1]) if match else None
        if status == 416:
            if asked.start == 0 and identity is None:
                return SourceError(f"{self.name} is empty; publish the artifact there again.")
            return self._is_stale(f"bytes {asked} were asked for, and it has fewer")
        if status is None or status in TRANSIENT or status >= 500:
            return TransferError(f"{self.name} cannot be read now ({reason}); try again.")
        return SourceError(
            f"{self.name} cannot be read ({reason}); check the address and the variables "
            f"{self._prefix}_* of the environment."
        )

    def _is_stale(self, why: str) -> StaleError:
        return StaleError(f"{self.name} changed: {why}; begin again with its header.")


def _reason(error: Exception) -> str:
    """The first line of a message of obstore, without queries and what a server wrote."""
    line = str(error).partition("\n")[0]
    line = re.sub(r"\?\S*", "?…", line)
    if match := STATUS.search(line):
        line = line[: match.end()]
    return line[:300]
