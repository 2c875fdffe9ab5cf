"""Sending: one request, whose answer begins in time, and whose address no log tells.

    response = send(client, request, shown="https://host/net", within_s=60)      the body unread

**In time.** httpx2 waits so long for the next byte, not for all of a head: a server that sends it
byte by byte, or one ``100 Continue`` after the other, would hold a client for weeks, and a name is
looked up without any limit. It has no limit for the whole, and shows the connection only when the
head is there. So a request is made in a thread of its own, which is left alone when its time is
over: it ends with the next byte after the client is closed.

**Untold.** httpx2 logs every URL at INFO, with the signature in its query, and httpcore2 at DEBUG
where a redirect leads. Whoever turns these logs on wants to see requests, also those of this
program that are not ours, so no level is changed: a filter rewrites the lines of our requests, and
of no others.
"""

import logging
import re
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2

__all__ = ["send"]

# To the next space: what ends a query inside quotes can be part of it as well.
QUERY = re.compile(r"\?\S+")

_here = threading.local()  # .names: the URL that this thread asks, and what logs call it


def send(
    client: "httpx2.Client", request: "httpx2.Request", *, shown: str, within_s: float
) -> "httpx2.Response":
    """The response to ``request`` as soon as its head is there, redirects not followed.

    Args:
        client: to send it with.
        request: to send.
        shown: what logs call its URL.
        within_s: for all until then: looking up the name, connecting, asking, the head.

    Raises:
        TimeoutError: If that was not enough; a response that comes later is closed.
        httpx2.TransportError: If it failed.
    """
    future: Future[httpx2.Response] = Future()

    def ask() -> None:
        _here.names = (str(request.url), shown)
        try:
            future.set_result(client.send(request, stream=True, follow_redirects=False))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=ask, name="send", daemon=True).start()
    try:
        return future.result(within_s)
    except BaseException:  # Ctrl-C as well
        future.add_done_callback(_close)
        raise


def _close(future: "Future[httpx2.Response]") -> None:
    if future.exception() is None:
        future.result().close()


class _Redaction(logging.Filter):
    """Takes the query out of what is logged in a thread that sends a request of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        names = getattr(_here, "names", None)
        if names is not None:
            text = record.getMessage().replace(*names)
            record.msg, record.args = QUERY.sub("?...", text), ()
        return True


for _name in ("httpx2", "httpcore2.http11"):  # a filter sees what is logged by that very name
    logging.getLogger(_name).addFilter(_Redaction())
