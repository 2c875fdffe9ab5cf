"""A slow, long link in front of any TCP server: a proxy that delays and paces what passes.

    with ShapedLink(port, mbit_s=10, rtt_ms=50) as link:    connect to link.port instead of port

Every byte waits half the round trip in each direction; replies share one rate, as on an access
line, whatever number of connections. A connection takes one round trip to be made, as TCP's does.
Done in user space, so that it needs no rights and no kernel module (netem is not everywhere); what
it leaves out is loss and TCP's slow start, so a real link starts slower still.
"""

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Self

PIECE_BYTES = 16 * 1024


class ShapedLink:
    """The proxy, in a thread of its own.

    Attributes:
        port: to connect to, on 127.0.0.1.
    """

    def __init__(self, target_port: int, *, mbit_s: float, rtt_ms: float) -> None:
        self._target_port = target_port
        self._bytes_s, self._one_way_s = mbit_s * 1e6 / 8, rtt_ms / 2000
        self._free_at = 0.0  # when the line has sent all that was given to it
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        self._server = starting.result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the link is taken away
            await asyncio.sleep(2 * self._one_way_s)  # the handshake
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            await asyncio.gather(
                self._pump(reader, back, is_paced=False), self._pump(there, writer, is_paced=True)
            )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_paced: bool
    ) -> None:
        """Pass on what comes, each piece when its time has come."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)  # of what is on the way

        async def deliver() -> None:
            while True:
                due, piece = await queue.get()
                await asyncio.sleep(due - self._loop.time())
                if not piece:
                    break
                writer.write(piece)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while piece := await reader.read(PIECE_BYTES):
                await queue.put((await self._sent(len(piece), is_paced=is_paced), piece))
            await queue.put((self._loop.time() + self._one_way_s, b""))
            await delivering
        except (ConnectionError, asyncio.CancelledError):
            delivering.cancel()
        finally:
            writer.close()

    async def _sent(self, num_bytes: int, *, is_paced: bool) -> float:
        """When a piece arrives; for replies, waits until the line has taken it."""
        now = self._loop.time()
        if not is_paced:
            return now + self._one_way_s
        self._free_at = max(self._free_at, now) + num_bytes / self._bytes_s
        arrives = self._free_at + self._one_way_s
        await asyncio.sleep(self._free_at - now)
        return arrives
