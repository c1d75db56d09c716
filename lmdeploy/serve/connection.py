"""One TCP connection: uvicorn's protocol with the limits that it lacks."""

from __future__ import annotations

import asyncio
import socket
import struct
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lmdeploy.serve.addresses import Crowd
from lmdeploy.serve.errors import HttpError, failure
from lmdeploy.serve.exchange import Counts

HEADER_SECONDS = 10.0
REFUSED_SECONDS = 1.0
"""For the client of a connection that is one too many to send the request which is refused."""
HEADER_BYTES = 1 << 20
"""Nothing of a request whose header is larger is answered; smaller ones that are still too large get a 431."""
UNREAD_SECONDS = 30.0
"""Without a byte taken of a response that is complete."""
MALFORMED = 'Invalid HTTP request received.'
PIPELINED = 16
"""Requests that are read before the one in front of them is answered."""
RESET = struct.pack('ii', 1, 0)
"""For SO_LINGER: what was not sent is forgotten, by the kernel too."""


class Connection(HttpToolsProtocol):
    """Closes connections whose request line and headers do not arrive in time, or without an end, those whose client
    does not take its response, and those that are one too many.

    Requests of which two readers could see different ends or different hosts are refused. An offer to change the
    protocol is declined, as if it were not there: the parser would take the body behind it for another protocol's.

    The scope of a request gets ``extensions['lmdeploy.abort']``, which drops the connection with all that waits in it:
    an ordinary close would wait for a reader that takes nothing.

    Args:
        crowd: the other connections.
        counts: where a refusal is counted.
        uvicorn: what uvicorn gives its protocols.
    """

    _timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _served: RequestResponseCycle | None = None
    _header_size = 0
    _address = ''
    _refusal: HttpError | None = None  # why it is one too many

    def __init__(self, crowd: Crowd, counts: Counts, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._crowd, self._counts = crowd, counts

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = transport.get_extra_info('peername')
        self._address = str(peer[0]) if isinstance(peer, tuple) else ''
        self._refusal = self._crowd.enter(self._address)
        if self._refusal is not None:
            self.transport = transport
            self._timer = self.loop.call_later(REFUSED_SECONDS, transport.abort)
            return
        super().connection_made(transport)
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        if self._served is not None and not self._served.response_complete:
            self._served.disconnected = True  # uvicorn tells the last request that was read, which may wait behind it
            self._served.message_event.set()
        if self._refusal is None:
            self._crowd.leave(self._address)
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            self._refuse(self._refusal)
            return
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b'CONNECT':
                    self.send_400_response(MALFORMED)
                    return
                data = self._head_without_offer() + data[offer.args[0]:]
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError:
                self.send_400_response(MALFORMED)
                return

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope['extensions'] = {'lmdeploy.abort': self._drop}  # type: ignore[dict-item]
        self._header_size = 0
        self._expect_header()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # it comes again, without the offer
            return
        self._stop_timer()
        self._check_framing()
        super().on_headers_complete()
        if 0 < len(self.pipeline) < PIPELINED:  # read on: otherwise nobody would see that the client leaves
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        self._watch_reader(None)

    def _refuse(self, refusal: HttpError) -> None:
        """Answer a first request, whatever it is, and close: not earlier, as what is unread then costs the answer."""
        if self.transport.is_closing():
            return
        told = failure(refusal, '')
        self._counts.rejected[told.code] += 1
        fields = [(b'content-type', b'application/json'), (b'content-length', str(len(told.body)).encode()),
                  (b'connection', b'close'), *told.headers]
        self.transport.write(b'HTTP/1.1 %d %s\r\n%s\r\n%s' % (
            told.status, HTTPStatus(told.status).phrase.encode(),
            b''.join(b'%s: %s\r\n' % field for field in fields), told.body))
        self.transport.close()

    def _check_framing(self) -> None:
        """Refuse what the parser lets pass, by an error that it turns into a 400."""
        hosts = codings = 0
        for name, value in self.headers:
            if name == b'host':
                hosts += 1
            elif name == b'transfer-encoding':
                codings += 1
                if value.strip().lower() != b'chunked' or self.parser.get_http_version() != '1.1':
                    raise ValueError('a coding that is not understood')
        if hosts > 1 or codings > 1:
            raise ValueError('a field that there can be only one of')

    def _head_without_offer(self) -> bytes:
        """The head of the request that the parser stopped at, for another parser."""
        lines = [self.parser.get_method() + b' ' + self.url + b' HTTP/' + self.parser.get_http_version().encode()]
        lines += [name + b': ' + value for name, value in self.headers if name not in (b'upgrade', b'http2-settings')]
        return b'\r\n'.join(lines) + b'\r\n\r\n'

    def _watch_reader(self, before: int | None) -> None:
        """Every so often, as long as bytes wait: drop the connection if no less wait than ``before``."""
        self._unread_timer = None
        waiting = self.transport.get_write_buffer_size()
        if before is not None and waiting >= before:
            self._drop()
        elif waiting:
            self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self._watch_reader, waiting)

    def _drop(self) -> None:
        """Close at once, and let the client know that something is missing."""
        sock = self.transport.get_extra_info('socket')
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def _count(self, size: int) -> None:
        self._header_size += size
        if self._header_size > HEADER_BYTES:
            self._drop()

    def _expect_header(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._drop)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
