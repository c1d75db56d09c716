"""A server on a loopback port, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

from lmdeploy.serve.lifecycle import Watcher, bind
from lmdeploy.serve.lifecycle import serve as run_server


class Live:
    """Where the server listens, and the way to stop it."""

    def __init__(self, server, drain_seconds: float) -> None:
        self.server = server
        self.told: list[str] = []
        self.sock = bind('127.0.0.1', 0)
        self.port = self.sock.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self._ready = threading.Event()
        self._drain = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        async def load() -> None:
            return None

        watcher = Watcher(ready=self._ready.set, stats=self.told.append, draining=lambda: self.told.append('draining'))
        await run_server(self.server.app, self.sock, load, watcher, drain_seconds=self._drain, stop=self._stop)

    def start(self) -> None:
        self.thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        """Ask it to drain; returns at once."""
        assert self._loop is not None and self._stop is not None
        if self.thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)


@contextmanager
def live(server, drain_seconds: float = 5.0):
    running = Live(server, drain_seconds)
    running.start()
    try:
        yield running
    finally:
        running.stop()
        running.thread.join(20)
        assert not running.thread.is_alive()
