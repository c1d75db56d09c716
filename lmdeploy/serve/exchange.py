"""The response of one request: what was sent of it, and what can still be sent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from starlette.responses import Response

from lmdeploy.errors import LmdeployError
from lmdeploy.log import get_logger
from lmdeploy.serve.errors import Failure, failure
from lmdeploy.serve.http import Message, Request, Send, Stream
from lmdeploy.serve.middleware import Header
from lmdeploy.serve.sse import Writer

JSON: Header = (b'content-type', b'application/json')
CLOSE: Header = (b'connection', b'close')
SAFE: Header = (b'x-content-type-options', b'nosniff')
PLAIN = re.compile(r'[A-Za-z0-9_.-]{1,64}')
"""Names of fields that a header may carry."""
MOST_NAMES = 16


class Counts(Protocol):
    """What an exchange adds to the metrics."""

    rejected: Counter[str]


class Exchange:
    """Sends whole responses and streams, each with the headers that all have, and tells of errors in the form that is
    still possible: as a response, as the last event of a stream, or by dropping the connection."""

    def __init__(self, counts: Counts, request: Request, send: Send) -> None:
        self.request, self._counts, self._send = request, counts, send
        name = request.id.encode()
        # OpenAI's clients read the one, Anthropic's the other.
        self.headers: list[Header] = [(b'x-request-id', name), (b'request-id', name), SAFE]
        self.failure: Callable[[BaseException, str], Failure] = failure
        self.head_only = False
        self.status = 0  # 0: nothing was sent
        self.code = ''  # of the error, if there was one
        self._stream: Stream | None = None
        self._writer: Writer | None = None

    async def send(self, message: Message) -> None:
        """The ASGI callable for the application inside."""
        if message['type'] == 'http.response.start':
            self.status = message['status']
            message = {**message, 'headers': [*message['headers'], *self.headers, *self._unknown_fields()]}
        elif self.head_only and message['type'] == 'http.response.body':
            message = {**message, 'body': b''}
        await self._send(message)

    def _unknown_fields(self) -> list[Header]:
        """What was left out of the request, for its client to see."""
        names = self.request.unknown_fields
        if not names:
            return []
        shown = [name if PLAIN.fullmatch(name) else '?' for name in names[:MOST_NAMES]]
        return [(b'x-unknown-fields', ', '.join(shown + ['...'] * (len(names) > MOST_NAMES)).encode())]

    async def reply(self, response: Response) -> None:
        """Send a whole response."""
        await response(self.request.scope, self.request.receive, self.send)

    def take(self, stream: Stream) -> None:
        """The response is this one, which :meth:`produce` sends."""
        self._stream = stream

    async def produce(self) -> None:
        """If the response is a stream: wait for the first chunk, and only then say that all is well; send all that
        follow."""
        stream = self._stream
        if stream is None:
            return
        first = await anext(stream.chunks)
        await self.send({'type': 'http.response.start', 'status': stream.status_code, 'headers': stream.raw_headers})
        self._writer = writer = Writer(self._send, self.request.limits)
        writer.write(first)
        async for chunk in stream.chunks:
            if stream.paced:
                await writer.room(len(chunk))
            writer.write(chunk)
        await writer.finish()

    async def end(self) -> None:
        """Nothing more will come."""
        if self._writer is not None:
            await self._send({'type': 'http.response.body', 'body': b'', 'more_body': False})

    async def fail(self, error: Exception) -> None:
        """Tell the client of an error."""
        told = self.failure(error, self.request.id)
        self.code = told.code
        self._log(error, told)
        if not self.status:
            if not self.request.outcome:
                self._counts.rejected[told.code] += 1
            if told.code != 'request_cancelled':
                response = Response(told.body, told.status)
                closing = (CLOSE,) if told.status in (408, 413, 431) else ()  # what follows may be the rest of a body
                response.raw_headers += [JSON, *told.headers, *closing]
                await self.reply(response)
            return
        if self._writer is None or self._stream is None or self._stream.error is None or told.code == 'slow_reader':
            self._abort()
            return
        self._writer.write(self._stream.error(error))
        await self._writer.finish()
        await self.end()

    async def close(self) -> None:
        """Stop what still produces."""
        if self._stream is not None:
            await self._stream.chunks.aclose()
        if self._writer is not None:
            await self._writer.close()

    def _abort(self) -> None:
        """Drop the connection: without an end, the client knows that something is missing."""
        abort = self.request.scope.get('extensions', {}).get('lmdeploy.abort')
        if abort is not None:
            abort()

    def _log(self, error: Exception, told: Failure) -> None:
        logger = get_logger()
        if isinstance(error, LmdeployError):
            level = logger.error if told.status == 500 else logger.info
            why = repr(str(error)[:500]) if told.status >= 500 else error.code  # others' texts quote what was sent
            level('request %s: %d %s: %s', self.request.id, told.status, told.code, why)
        else:
            logger.error('request %s: %s %s failed', self.request.id, self.request.method, self.request.path[:200],
                         exc_info=error)
