"""The ASGI application: one path that every request takes, from its headers to its last byte.

identity -> header limits -> host -> CORS -> key -> route -> body -> handler, watched and under a deadline.

Unknown paths are refused only after the key is, so that without one nobody learns which routes there are. A client that
goes away cancels the handler, and with it everything that the handler has started. A handler's error before the first
byte is a response of its own; later it is the last event of the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from lmdeploy.errors import LmdeployError
from lmdeploy.log import get_logger
from lmdeploy.serve import middleware
from lmdeploy.serve.audit import Entry, now
from lmdeploy.serve.auth import Access
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.deadline import Deadline
from lmdeploy.serve.errors import Failure, HttpError, failure
from lmdeploy.serve.http import CLOSE, JSON, Message, Receive, Reply, Request, Send, Stream
from lmdeploy.serve.routes import Route, Router
from lmdeploy.serve.sse import Writer

PROBES = ('/health', '/ready', '/metrics')
"""Asked every few seconds by machines; not logged."""
SAFE = ((b'x-content-type-options', b'nosniff'),)


class App:
    """Serves the routes of a :class:`Router`. Build it with :func:`lmdeploy.serve.openai.api_server.create_app`."""

    def __init__(self, context: ServerContext, router: Router) -> None:
        self.context = context
        self.router = router

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope['type'] == 'http':
            await self._http(scope, receive, send)
        elif scope['type'] == 'lifespan':
            await _lifespan(receive, send)
        else:  # there are no websockets: an unanswered handshake is refused
            await send({'type': 'websocket.close', 'code': 1008})

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, middleware.request_id(scope['headers']))
        exchange = _Exchange(self.context, request, send)
        try:
            try:
                route = self._admit(request, exchange)
                if route is not None:
                    await self._serve(route, request, exchange)
            except Exception as error:  # the outermost frame: whatever it is becomes a response
                await exchange.fail(error)
        except asyncio.CancelledError:
            request.outcome = 'cancelled'
            raise
        finally:
            self._record(request, exchange)

    def _admit(self, request: Request, exchange: _Exchange) -> Route | None:
        """The route, if the request may go there; None: it was a question of a browser, and the answer is set."""
        headers, context = request.scope['headers'], self.context
        middleware.check_headers(headers, context.limits, len(request.path))
        if context.check_host:
            middleware.check_host(headers)
        exchange.headers += context.cors.answer(headers)
        if request.method == 'OPTIONS':
            asked = context.cors.preflight(headers)
            if asked is not None:
                exchange.preflight = asked
                return Route('OPTIONS', request.path, _preflight, Access.OPEN, '')
        route = self.router.routes.get(request.path, {}).get('GET' if request.method == 'HEAD' else request.method)
        request.caller = context.keys.authenticate(headers, Access.USER if route is None else route.access)
        return self.router.find(request.method, request.path)

    async def _serve(self, route: Route, request: Request, exchange: _Exchange) -> None:
        await request.read_body(self.context.limits)
        task = asyncio.ensure_future(self._answer(route, request, exchange))
        gone = asyncio.ensure_future(request.gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                request.outcome = 'cancelled'
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.wait({task, gone})
        if task.cancelled():
            request.outcome = 'cancelled'
        elif task.exception() is not None:
            raise task.exception()  # type: ignore[misc]

    async def _answer(self, route: Route, request: Request, exchange: _Exchange) -> None:
        seconds = _seconds(request, self.context.limits.request_seconds)
        deadline = Deadline(seconds, HttpError('LMD-517', seconds=seconds))
        self.context.deadlines.add(deadline)
        try:
            try:
                async with deadline:
                    reply = await route.handler(request)
                    if isinstance(reply, Reply):
                        await exchange.reply(reply)
                        return
                    await exchange.begin(reply)
                    await exchange.produce(reply.chunks)
            except Exception as error:  # told to the client in the form that is still possible
                await exchange.fail(error)
            else:
                await exchange.end()
        finally:
            self.context.deadlines.discard(deadline)
            await exchange.close()

    def _record(self, request: Request, exchange: _Exchange) -> None:
        context, status = self.context, exchange.status
        context.metrics.responses[status] += 1
        if request.path in PROBES:
            return
        get_logger().info('%s %s %r %d %s %.3f s', request.id, request.method[:16], request.path[:200], status,
                          request.caller.id, time.monotonic() - request.started)
        if context.audit is None:
            return
        client = request.scope.get('client')
        outcome = exchange.code or request.outcome or ('finished' if status < 400 else 'rejected')
        context.audit.add(Entry(
            time=now(), request=request.id, key=request.caller.id, client=client[0] if client else '',
            method=request.method[:16], route=request.path, model=request.model, status=status, outcome=outcome,
            prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens,
            seconds=round(time.monotonic() - request.started, 4),
            prompt_digest=request.digest() if context.audit.digests and request.body else None))


class _Exchange:
    """The response of one request: what was sent of it, and what can still be sent."""

    def __init__(self, context: ServerContext, request: Request, send: Send) -> None:
        self.context, self.request, self._send = context, request, send
        self.headers: list[middleware.Header] = [(b'x-request-id', request.id.encode()), *SAFE]
        self.preflight: list[middleware.Header] = []
        self.status = 0  # 0: nothing was sent
        self.code = ''  # of the error, if there was one
        self._stream: Stream | None = None
        self._writer: Writer | None = None

    async def reply(self, reply: Reply) -> None:
        """Send a whole response."""
        await self._start(reply.status, [*reply.headers, *self.preflight,
                                         (b'content-length', str(len(reply.body)).encode())])
        body = b'' if self.request.method == 'HEAD' else reply.body
        await self._send({'type': 'http.response.body', 'body': body})

    async def begin(self, stream: Stream) -> None:
        """Wait for the first chunk, and only then say that all is well."""
        self._stream = stream
        first = await anext(stream.chunks)
        await self._start(200, list(stream.headers))
        self._writer = Writer(self._send, self.context.limits)
        self._writer.write(first)

    async def produce(self, chunks: AsyncGenerator[bytes, None]) -> None:
        assert self._writer is not None
        async for chunk in chunks:
            self._writer.write(chunk)
        await self._writer.finish()

    async def end(self) -> None:
        if self._writer is not None:
            await self._send({'type': 'http.response.body', 'body': b'', 'more_body': False})

    async def fail(self, error: Exception) -> None:
        """Tell the client of an error."""
        told = failure(error, self.request.id)
        self.code = told.code
        self._log(error, told)
        if not self.status:
            if not self.request.outcome:
                self.context.metrics.rejected[told.code] += 1
            if told.code != 'request_cancelled':
                closing = (CLOSE,) if told.status in (408, 413, 431) else ()  # what follows may be the rest of a body
                await self.reply(Reply(told.body, told.status, (JSON, *told.headers, *closing)))
            return
        if self._writer is None or self._stream is None or told.code == 'slow_reader':
            self._abort()
            return
        self._writer.write(self._stream.error(error))
        await self._writer.finish()
        await self.end()

    def _abort(self) -> None:
        """Drop the connection: without an end, the client knows that something is missing."""
        abort = self.request.scope.get('extensions', {}).get('lmdeploy.abort')
        if abort is not None:
            abort()

    async def close(self) -> None:
        """Stop what still produces."""
        if self._stream is not None:
            await self._stream.chunks.aclose()
        if self._writer is not None:
            await self._writer.close()

    async def _start(self, status: int, headers: list[middleware.Header]) -> None:
        self.status = status
        await self._send({'type': 'http.response.start', 'status': status, 'headers': [*headers, *self.headers]})

    def _log(self, error: Exception, told: Failure) -> None:
        logger = get_logger()
        if isinstance(error, LmdeployError):
            level = logger.error if told.status == 500 else logger.info
            level('request %s: %d %s: %r', self.request.id, told.status, told.code, str(error)[:500])
        else:
            logger.error('request %s: %s %s failed', self.request.id, self.request.method, self.request.path[:200],
                         exc_info=error)


async def _preflight(request: Request) -> Reply:
    return Reply(status=204, headers=())


def _seconds(request: Request, most: int) -> float:
    """The deadline: the server's, or a shorter one that the client asks for with ``x-request-timeout``."""
    asked = request.header(b'x-request-timeout')
    if asked is None:
        return float(most)
    try:
        seconds = float(asked)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise HttpError('LMD-512', param='x-request-timeout', reason='it must be a positive number of seconds')
    return min(float(most), seconds)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({'type': f'{message["type"]}.complete'})
        if message['type'] == 'lifespan.shutdown':
            return


