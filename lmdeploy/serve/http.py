"""A request and its reply on bare ASGI: a capped body, a watch on the client, whole replies and streams."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmdeploy.serve.auth import Caller
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.middleware import Header, check_content_type, header, parse_json

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON: Header = (b'content-type', b'application/json')
CLOSE: Header = (b'connection', b'close')


@dataclass(slots=True)
class Request:
    """One HTTP request on its way to a handler."""

    scope: Message
    receive: Receive
    id: str
    caller: Caller = field(default_factory=Caller)
    body: bytes = b''
    started: float = field(default_factory=time.monotonic)
    # what the audit log and the metrics say of it, filled in by its handler
    model: str = ''
    prompt_tokens: int = 0
    output_tokens: int = 0
    outcome: str = ''

    @property
    def method(self) -> str:
        return self.scope['method']

    @property
    def path(self) -> str:
        return self.scope['path']

    def header(self, name: bytes) -> str | None:
        value = header(self.scope['headers'], name)
        return None if value is None else value.decode('latin-1')

    async def read_body(self, limits: Limits) -> None:
        """Read the body, no more of it and no longer than the limits allow.

        Raises:
            HttpError: LMD-508, not JSON; LMD-509, too large; LMD-526, too slow; LMD-530, the client went away.
        """
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
        self.body = b''.join(pieces)
        if self.body:
            check_content_type(self.scope['headers'])

    def json(self, limits: Limits) -> Any:
        """The body's value; see :func:`lmdeploy.serve.middleware.parse_json`."""
        return parse_json(self.body, limits)

    def digest(self) -> str:
        """Of the body, to tell equal requests without keeping them."""
        return hashlib.sha256(self.body).hexdigest()[:32]

    async def gone(self) -> None:
        """Returns when the client has closed the connection. The body must have been read."""
        while (await self.receive())['type'] != 'http.disconnect':
            pass


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response."""

    body: bytes = b''
    status: int = 200
    headers: tuple[Header, ...] = (JSON,)


@dataclass(frozen=True, slots=True)
class Stream:
    """A response in pieces. ``chunks`` yields ready bytes; ``error`` turns a failure after the first of them into a
    last piece."""

    chunks: AsyncGenerator[bytes, None]
    error: Callable[[BaseException], bytes]
    headers: tuple[Header, ...] = ((b'content-type', b'text/event-stream; charset=utf-8'),
                                   (b'cache-control', b'no-cache'), (b'x-accel-buffering', b'no'))


Handler = Callable[[Request], Awaitable[Reply | Stream]]


def json_reply(value: object, status: int = 200) -> Reply:
    """A structure, or plain values, as JSON."""
    return Reply(msgspec.json.encode(value), status)
