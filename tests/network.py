"""A bad network between a device and the server: a TCP proxy that is slow, breaks, swallows, or listens in."""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import suppress


class Proxy:
    """Forwards 127.0.0.1:`port` to `target`; a context manager, in a thread of its own.

    Args:
        target: HOST:PORT.
        bytes_per_second: of what clients send; None is as fast as it goes.
        inside, outside: contexts that end the clients' TLS here and speak TLS to the target, so that `heard` is
        plain text.
    """

    def __init__(
        self,
        target: str,
        bytes_per_second: float | None = None,
        inside: ssl.SSLContext | None = None,
        outside: ssl.SSLContext | None = None,
    ) -> None:
        self.host, _, port = target.partition(":")
        self.target_port, self.bytes_per_second = int(port), bytes_per_second
        self.inside, self.outside = inside, outside
        self.heard = bytearray()
        self.passed = 0
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def reset(self) -> None:
        """Break all connections at once, without a good-bye."""
        self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in list(self._writers)])

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self.inside)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self.host, self.target_port, ssl=self.outside)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        with suppress(OSError):
            await asyncio.gather(
                self._pump(reader, back, self.bytes_per_second), self._pump(there, writer, None)
            )
        self._writers -= {writer, back}
        for one in (writer, back):
            one.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: float | None
    ) -> None:
        while data := await reader.read(4096 if rate else 65536):
            self.heard += data if self.inside else b""
            self.passed += len(data) if rate else 0
            if rate:
                await asyncio.sleep(len(data) / rate)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
