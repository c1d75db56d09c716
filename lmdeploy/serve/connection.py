"""One TCP connection: uvicorn's protocol with the limits that it lacks."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
HEADER_BYTES = 1 << 20
"""Nothing of a request whose header is larger is answered; smaller ones that are still too large get a 431."""


class Connection(HttpToolsProtocol):
    """Closes connections whose request line and headers do not arrive in time, or without an end.

    The scope of a request gets ``extensions['lmdeploy.abort']``, which drops the connection with all that waits in it:
    an ordinary close would wait for a reader that takes nothing.
    """

    _timer: asyncio.TimerHandle | None = None
    _header_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope['extensions'] = {'lmdeploy.abort': self.transport.abort}  # type: ignore[dict-item]
        self._header_size = 0
        self._expect_header()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._header_size += size
        if self._header_size > HEADER_BYTES:
            self.transport.abort()

    def _expect_header(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
