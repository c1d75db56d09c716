"""A request and its reply: Starlette's, with a capped body, a watch on the client, and streams of prebuilt bytes."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
from starlette import requests
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lmdeploy.serve.auth import Caller
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.middleware import check_content_type, header

__all__ = ['EXCHANGE', 'REQUEST', 'Message', 'Receive', 'Request', 'Response', 'Scope', 'Send', 'Stream', 'json_reply']

REQUEST, EXCHANGE = 'lmdeploy.request', 'lmdeploy.exchange'
"""Where a scope holds the :class:`Request` and the response that is under way."""
EVENTS = MappingProxyType({'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-cache',
                           'x-accel-buffering': 'no'})


class Request(requests.Request):
    """One HTTP request on its way to a handler, whose body was read before the handler runs.

    Attributes:
        id: the client's ``x-request-id``, or one made here.
        caller: who sends it.
        content: the body's bytes.
        value: what the route made of them.
        started: monotonic seconds.
        model, prompt_tokens, output_tokens, outcome: what the audit log and the metrics say of it, filled in by its
            handler.
        unknown_fields: names of fields of the body that nobody knows.
    """

    def __init__(self, scope: Scope, receive: Receive, request_id: str, limits: Limits) -> None:
        super().__init__(scope, receive)
        self.id = request_id
        self.limits = limits
        self.caller = Caller()
        self.content = b''
        self.value: Any = None
        self.started = time.monotonic()
        self.model = ''
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.outcome = ''
        self.unknown_fields: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return self.scope['path']

    def header(self, name: bytes) -> str | None:
        value = header(self.scope['headers'], name)
        return None if value is None else value.decode('latin-1')

    async def read_body(self) -> None:
        """Read the body, no more of it and no longer than the limits allow.

        Raises:
            HttpError: LMD-508, not JSON; LMD-509, too large; LMD-526, too slow; LMD-530, the client went away.
        """
        limits = self.limits
        announced = self.header(b'content-length')
        if announced is not None and announced.isdigit() and int(announced[:20]) > limits.body_bytes:
            raise HttpError('LMD-509', most=limits.body_bytes)
        pieces, size = [], 0
        deadline = time.monotonic() + limits.body_seconds
        more = True
        while more:
            wait = min(limits.body_idle_seconds, max(deadline - time.monotonic(), 0.001))
            try:
                message = await asyncio.wait_for(self.receive(), wait)
            except asyncio.TimeoutError:
                raise HttpError('LMD-526', seconds=limits.body_seconds) from None
            if message['type'] == 'http.disconnect':
                raise HttpError('LMD-530')
            piece = message.get('body', b'')
            size += len(piece)
            if size > limits.body_bytes:
                raise HttpError('LMD-509', most=limits.body_bytes)
            pieces.append(piece)
            more = message.get('more_body', False)
        self.content = b''.join(pieces)
        if self.content:
            check_content_type(self.scope['headers'])

    async def body(self) -> bytes:
        return self.content

    async def json(self) -> Any:
        return self.value

    def digest(self) -> str:
        """Of the body, to tell equal requests without keeping them."""
        return hashlib.sha256(self.content).hexdigest()[:32]

    async def gone(self) -> None:
        """Returns when the client has closed the connection. The body must have been read."""
        while (await self.receive())['type'] != 'http.disconnect':
            pass


class Chunks(Protocol):
    """Pieces of a body; an async generator is the usual one."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def __anext__(self) -> Awaitable[bytes]: ...

    async def aclose(self) -> None: ...


class _Exchange(Protocol):
    def take(self, stream: Stream) -> None: ...


class Stream(Response):
    """A response in pieces.

    Args:
        chunks: yields ready bytes. The first is awaited before the status is sent, so that what fails until then is an
            ordinary response.
        error: turns a later failure into a last piece; None: the connection is dropped, so that the client knows that
            something is missing.
        paced: wait for a reader that is slow. It is for pieces that can wait elsewhere; where they are made, a reader
            must not hold up their making.
    """

    def __init__(self, chunks: Chunks, error: Callable[[BaseException], bytes] | None, *, status: int = 200,
                 headers: Mapping[str, str] = EVENTS, paced: bool = False) -> None:
        self.chunks, self.error, self.paced = chunks, error, paced
        self.status_code, self.background = status, None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # It is sent when the call has returned through all of FastAPI's layers: a coroutine that waits below them is
        # resumed through every one of them, at every chunk.
        exchange: _Exchange = scope[EXCHANGE]
        exchange.take(self)


def json_reply(value: object, status: int = 200) -> Response:
    """A structure, or plain values, as JSON."""
    return Response(msgspec.json.encode(value), status, media_type='application/json')
