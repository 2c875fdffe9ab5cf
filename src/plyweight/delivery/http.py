"""HTTP: one GET of one range of bytes, and a reply that must prove what it holds.

    GET /model.layered.safetensors          206 Partial Content
    Range: bytes=0-1048575                  Content-Range: bytes 0-1048575/4200000
    Accept-Encoding: identity               Content-Length: 1048576
    If-Match: "v1"                          ETag: "v1"

Servers, caches and proxies on the way pack, cut, shift and mix ranges. A reply is believed only
where its status, its Content-Range, its length and its ETag agree with each other and with what
was asked; the bytes themselves are judged by the digests of the header.
"""

import hashlib
import re
import ssl
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from plyweight.artifact import ByteRange
from plyweight.delivery.hosts import Kind, is_proxied, kind_of, kinds_of, says_loopback
from plyweight.delivery.replies import Question
from plyweight.delivery.sending import send
from plyweight.delivery.source import Reply
from plyweight.errors import SourceError, TransferError

try:
    import httpx2
except ImportError as error:
    raise ImportError(
        'reading from a web server needs httpx2; run: pip install "plyweight[http]"'
    ) from error

__all__ = ["HttpSource", "require_private"]

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What hosts answer to a signed URL whose time is over, or whose object was moved.
EXPIRED = frozenset({400, 401, 403, 404, 410})


class HttpSource:
    """An object behind an ``https://`` or ``http://`` URL.

    ``http://`` is for hosts where nobody is on the way: those of this machine (127.0.0.1, ::1,
    localhost) as they are, since whoever listens there can do as much already; others only with
    ``allow_http``, because anybody between could read the token and change the bytes.

    Redirects are followed, at most five: from https to https only; from http to http under the
    rule above; never to an address inside (:mod:`plyweight.delivery.hosts`) unless the URL leads
    to such an address itself. The end of the way is remembered for the next request, and forgotten
    as soon as it fails, because signed URLs expire. Proxies and certificates are taken from the
    environment (``HTTPS_PROXY``, ``SSL_CERT_FILE``); behind a proxy names are the proxy's to judge.

    Args:
        url: with ``user:password@`` if the server wants them. They and the query, which may hold
            a signature, are left out of ``name``, of every message and of what httpx2 logs.
        token: sent as a bearer token to the host of ``url`` and to no other.
        allow_http: allow ``http://`` to hosts other than this machine.
        name: what messages call it; the URL by default.
        connect_timeout_s: for the connection to be made.
        read_timeout_s: for the next byte to come.
        head_timeout_s: for a reply to begin: for the connection and all of the head.

    Raises:
        SourceError: If the address may not be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        allow_http: bool = False,
        name: str | None = None,
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 30.0,
        head_timeout_s: float = 60.0,  # a slow connection, and a slow first byte after it
    ) -> None:
        self._url, userinfo = _parse(url)
        self._name = name or _named(self._url)
        self._allow_http, self._head_timeout_s = allow_http, head_timeout_s
        self._authorization = _authorization(self._name, token, userinfo)
        _require_private(self._url, self._name, allow_http=allow_http)
        self._client = httpx2.Client(
            headers={"Accept-Encoding": "identity", "User-Agent": "plyweight"},
            timeout=httpx2.Timeout(read_timeout_s, connect=connect_timeout_s),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=16),
        )
        self._finalizer = weakref.finalize(self, self._client.close)
        self._lock = threading.Lock()
        self._location: httpx2.URL | None = None  # where the last redirect ended

    @property
    def name(self) -> str:
        """The URL without user and password, and for the query, if any, a digest of it."""
        return self._name

    @contextmanager
    def get(self, byte_range: ByteRange, *, identity: str | None = None) -> Iterator[Reply]:
        """Ask once for ``byte_range``."""
        headers = {"Range": f"bytes={byte_range.start}-{byte_range.stop - 1}"}
        if identity is not None:
            # Not If-Range: that would answer a change with the whole new object.
            headers["If-Match"] = identity
        response = self._ask(headers)
        try:
            question = Question(
                name=self.name,
                at=self._at(response.url),
                byte_range=byte_range,
                identity=identity,
                is_authorized=self._authorization is not None,
            )
            yield question.judge(response)
        finally:
            response.close()  # the connection too, if bytes are left in it

    def close(self) -> None:
        """Close all connections."""
        self._finalizer()

    # --- asking ---------------------------------------------------------------------------------

    def _ask(self, headers: dict[str, str]) -> httpx2.Response:
        """The reply at the end of the redirects."""
        with self._lock:
            location = self._location
        try:
            response = self._follow(location or self._url, headers)
            if response.status_code in EXPIRED and not self._is_home(response.url):
                response.close()
                response = self._follow(self._url, headers)
        except (TransferError, SourceError):
            self._remember(None)
            raise
        self._remember(None if self._is_home(response.url) else response.url)
        return response

    def _remember(self, location: httpx2.URL | None) -> None:
        with self._lock:
            self._location = location

    def _follow(self, url: httpx2.URL, headers: dict[str, str]) -> httpx2.Response:
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(url, headers)
            if response.status_code not in REDIRECTS:
                return response
            response.close()
            url = self._redirected(url, response.headers.get("Location", ""))
        raise SourceError(
            f"{self.name} is redirected more than {MAX_REDIRECTS} times; give the URL that it ends "
            "at, or tell whoever runs it."
        )

    def _send(self, url: httpx2.URL, headers: dict[str, str]) -> httpx2.Response:
        """One request, and the head of its reply."""
        if self._authorization and _is_same_host(self._url, url):
            headers = headers | {"Authorization": self._authorization}
        request = self._client.build_request("GET", url, headers=headers)
        is_home = _is_same_host(self._url, url)
        path = url.raw_path.partition(b"?")[0].decode("ascii") if is_home else "/..."
        try:
            response = send(
                self._client,
                request,
                shown=f"{_site(url)}{path}",
                within_s=self._head_timeout_s,
            )
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise TransferError(f"{self._at(url)} did not answer in time; try again.") from error
        except httpx2.TransportError as error:
            if reason := _certificate_error(error):
                raise SourceError(
                    f"{self._at(url)} has a certificate that is not trusted ({reason}); set "
                    "SSL_CERT_FILE if it is one of your own."
                ) from error
            raise TransferError(f"{self._at(url)} cannot be reached ({error}).") from error
        try:
            self._require_peer(url, response)
        except BaseException:
            response.close()
            raise
        return response

    def _redirected(self, url: httpx2.URL, location: str) -> httpx2.URL:
        """Where a redirect leads, if it may."""
        try:
            target, _ = _parse(str(url.join(location)) if location else "")
        except (SourceError, httpx2.InvalidURL):
            raise SourceError(
                f"{self.name} is redirected to something that is not a URL; tell whoever runs it."
            ) from None
        if target.scheme == "http" and (url.scheme == "https" or not self._may_be_plain(target)):
            raise SourceError(
                f"{self.name} is redirected to plain http at {target.host}, where anybody on the "
                "way can change bytes; ask its owner for an https address."
            )
        if not _is_same_host(self._url, target):
            self._require_reachable(target, _kinds(target))
        return target

    def _require_reachable(self, target: httpx2.URL, kinds: frozenset[Kind]) -> None:
        """Refuse a host that only insiders reach, unless the original is one as well."""
        inner = kinds - {"global"}
        if inner and not inner <= _kinds(self._url):
            raise SourceError(
                f"{self.name} is redirected to {target.host}, a {min(inner)} address, which is "
                "refused because it may be an attack on this network; give that address itself if "
                "you trust it."
            )

    def _require_peer(self, url: httpx2.URL, response: httpx2.Response) -> None:
        """Look at who has answered: a name may stand for another address than a moment ago."""
        if _is_same_host(self._url, url) or is_proxied(url.scheme, url.host):
            return
        stream = response.extensions["network_stream"]
        try:
            peer = str(stream.get_extra_info("server_addr")[0])
        except OSError as error:
            raise TransferError(f"{self._at(url)} hung up at once ({error}).") from error
        self._require_reachable(url, frozenset({kind_of(peer)}))

    def _may_be_plain(self, url: httpx2.URL) -> bool:
        return _may_be_plain(url, allow_http=self._allow_http)

    def _is_home(self, url: httpx2.URL) -> bool:
        return url == self._url

    def _at(self, url: httpx2.URL) -> str:
        """The name, and the host if a redirect led elsewhere; paths there may be secrets."""
        if _is_same_host(self._url, url):
            return self.name
        return f"{self.name}, redirected to {_site(url)},"


def require_private(url: str, name: str, *, allow_http: bool) -> None:
    """Refuse plain http to another machine, unless it is allowed, before anything is sent there.

    Raises:
        SourceError: If ``url``, which messages call ``name``, may not be used.
    """
    _require_private(_parse(url)[0], name, allow_http=allow_http)


def _require_private(url: httpx2.URL, name: str, *, allow_http: bool) -> None:
    if not _may_be_plain(url, allow_http=allow_http):
        raise SourceError(
            f"{name} is plain http, where anybody on the way can read a token and change bytes; "
            "use https, or allow it with `allow_http` (--allow-http)."
        )


def _may_be_plain(url: httpx2.URL, *, allow_http: bool) -> bool:
    return url.scheme == "https" or allow_http or says_loopback(url.host)


# --- small readings of URLs and headers ---------------------------------------------------------


def _parse(url: str) -> tuple[httpx2.URL, tuple[str, str] | None]:
    """The URL without its user and password, and those."""
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        parsed = httpx2.URL("")  # its message would show the address, secrets included
    is_host = re.fullmatch(rb"[0-9a-z._:-]+", parsed.raw_host)
    if parsed.scheme not in ("http", "https") or not is_host:
        raise SourceError(
            "the address is not a URL like https://host/path; check its spelling."
        ) from None
    userinfo = (parsed.username, parsed.password) if parsed.userinfo else None
    return parsed.copy_with(userinfo=b"", fragment=None), userinfo


def _authorization(name: str, token: str | None, userinfo: tuple[str, str] | None) -> str | None:
    if token is None:
        if userinfo is None:
            return None
        request = httpx2.Request("GET", "https://host")
        # The library's own encoding of user and password.
        next(httpx2.BasicAuth(*userinfo).auth_flow(request))
        return request.headers["Authorization"]
    if userinfo is not None:
        raise SourceError(f"{name} has a user in its URL and a token beside it; give one of them.")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise SourceError(f"the token for {name} holds characters that no header may; check it.")
    return f"Bearer {token}"


def _site(url: httpx2.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _named(url: httpx2.URL) -> str:
    """What may be shown of a URL, and is another for another URL.

    A query often says which model it is, and often holds a signature that nobody may see.
    """
    digest = f"?[sha256 {hashlib.sha256(url.query).hexdigest()[:16]}]" if url.query else ""
    return f"{_site(url)}{url.path}{digest}"


def _port(url: httpx2.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _is_same_host(origin: httpx2.URL, url: httpx2.URL) -> bool:
    """Whether what may be told to ``origin`` may be told to ``url``."""
    if (url.scheme, url.host, _port(url)) == (origin.scheme, origin.host, _port(origin)):
        return True
    upgraded = (origin.scheme, _port(origin), url.scheme, _port(url)) == ("http", 80, "https", 443)
    return upgraded and url.host == origin.host


def _kinds(url: httpx2.URL) -> frozenset[Kind]:
    """Of the host, as far as can be seen from here: behind a proxy only a number says it."""
    if not is_proxied(url.scheme, url.host):
        return kinds_of(url.host, _port(url))
    try:
        return frozenset({kind_of(url.host)})
    except ValueError:
        return frozenset({"loopback" if says_loopback(url.host) else "global"})


def _certificate_error(error: BaseException | None) -> str | None:
    """Why a certificate was refused, if that is what went wrong."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None
