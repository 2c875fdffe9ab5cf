"""Sending: one request, whose answer begins in time.

    response = send(client, request, within_s=60)      the body unread

httpx2 waits so long for the next byte, not for all of a head: a server that sends it
byte by byte, or one ``100 Continue`` after the other, would hold a client for weeks, and a name is
looked up without any limit. It has no limit for the whole, and shows the connection only when the
head is there. So a request is made in a thread of its own, which is left alone when its time is
over: it ends with the next byte after the client is closed.
"""

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2

__all__ = ["send"]


def send(
    client: "httpx2.Client", request: "httpx2.Request", *, within_s: float
) -> "httpx2.Response":
    """The response to ``request`` as soon as its head is there, redirects not followed.

    Args:
        client: to send it with.
        request: to send.
        within_s: for all until then: looking up the name, connecting, asking, the head.

    Raises:
        TimeoutError: If that was not enough; a response that comes later is closed.
        httpx2.TransportError: If it failed.
    """
    future: Future[httpx2.Response] = Future()

    def ask() -> None:
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
