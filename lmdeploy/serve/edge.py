"""The edge: the one middleware, which every request passes from its headers to its last byte.

identity -> header limits -> host -> CORS -> key -> route -> body -> application, watched and under a deadline.

It is pure ASGI, around FastAPI's routing: nothing buffers a stream, nothing hides a disconnect, and what FastAPI or a
handler raises ends here. Unknown paths are refused only after the key is, so that without one nobody learns which
routes there are. A client that goes away cancels the handler, and with it everything that the handler has started. A
handler's error before the first byte is a response of its own; later it is the last event of the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Protocol

from starlette.responses import Response
from starlette.types import ASGIApp

from lmdeploy.log import get_logger
from lmdeploy.serve import middleware
from lmdeploy.serve.addresses import FailedKeys
from lmdeploy.serve.audit import AuditLog, Entry, now
from lmdeploy.serve.auth import Access, Caller, KeyRing, gives_key
from lmdeploy.serve.deadline import Deadline
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.exchange import Exchange
from lmdeploy.serve.http import EXCHANGE, REQUEST, Message, Receive, Request, Scope, Send
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.routes import Routes

PROBES = ('/health', '/ready', '/metrics')
"""Asked every few seconds by machines; not logged."""


class EdgeCounts(Protocol):
    """What the edge counts."""

    responses: Counter[int]
    rejected: Counter[str]
    unknown_fields: int


class EdgeContext(Protocol):
    """What the edge knows of its server."""

    @property
    def keys(self) -> KeyRing: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def cors(self) -> middleware.Cors: ...

    @property
    def check_host(self) -> bool: ...

    @property
    def audit(self) -> AuditLog | None: ...

    @property
    def deadlines(self) -> set[Deadline]: ...

    @property
    def metrics(self) -> EdgeCounts: ...


class Edge:
    """The middleware. :class:`lmdeploy.serve.app.App` puts it around its routes."""

    def __init__(self, app: ASGIApp, context: EdgeContext, routes: Routes) -> None:
        self.app, self.context, self.routes = app, context, routes
        self._failed_keys = FailedKeys(context.limits.bad_keys_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] == 'http':
            await self._http(scope, receive, send)
        elif scope['type'] == 'lifespan':
            await self.app(scope, receive, send)
        else:  # there are no websockets: an unanswered handshake is refused
            await send({'type': 'websocket.close', 'code': 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope['method']
        scope = {'query_string': b'', **scope, 'method': 'GET' if asked == 'HEAD' else asked}
        request = Request(scope, receive, middleware.request_id(scope['headers']), self.context.limits)
        exchange = Exchange(self.context.metrics, request, send)
        exchange.head_only = asked == 'HEAD'
        try:
            try:
                if self._admit(request, exchange):
                    await request.read_body()
                    await self._serve(request, exchange)
                else:
                    await exchange.reply(Response(status_code=204))
            except Exception as error:  # the outermost frame: whatever it is becomes a response
                await exchange.fail(error)
        except asyncio.CancelledError:
            request.outcome = 'cancelled'
            raise
        finally:
            self._record(request, exchange, asked[:16])

    def _admit(self, request: Request, exchange: Exchange) -> bool:
        """Whether there is a route, and the request may go there; False: it is a browser's question before a request,
        and the headers are the answer."""
        headers, context = request.scope['headers'], self.context
        methods = self.routes.at(request.path)
        route = methods.get(request.method)
        for known in [route] if route is not None else methods.values():  # a wrong method: as the path's right ones
            exchange.failure = known.failure
        middleware.check_headers(headers, context.limits, len(request.path))
        if context.check_host:
            middleware.check_host(headers)
        exchange.headers += context.cors.answer(headers)
        if request.method == 'OPTIONS':
            asked = context.cors.preflight(headers)
            if asked is not None:
                exchange.headers += asked
                return False
        access = Access.USER if route is None else route.access
        request.caller = self._identify(request, access)
        context.keys.permit(request.caller, access)
        if not methods:
            raise HttpError('LMD-506')
        if route is None:
            raise HttpError('LMD-507', method=request.method[:16], allowed=', '.join(sorted(methods)))
        return True

    def _identify(self, request: Request, access: Access) -> Caller:
        headers = request.scope['headers']
        try:
            return self.context.keys.identify(headers, access)
        except HttpError as error:
            if error.code == 'LMD-504' and gives_key(headers):
                self._failed_keys.note(client_of(request.scope))
            raise

    async def _serve(self, request: Request, exchange: Exchange) -> None:
        task = asyncio.ensure_future(self._answer(request, exchange))
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

    async def _answer(self, request: Request, exchange: Exchange) -> None:
        seconds = _seconds(request, self.context.limits.request_seconds)
        deadline = Deadline(seconds, HttpError('LMD-517', seconds=seconds))
        self.context.deadlines.add(deadline)
        scope = request.scope
        scope[REQUEST], scope[EXCHANGE] = request, exchange
        try:
            try:
                async with deadline:
                    await self.app(scope, _nothing_more, exchange.send)
                    await exchange.produce()
            except Exception as error:  # told to the client in the form that is still possible
                await exchange.fail(error)
            else:
                await exchange.end()
        finally:
            self.context.deadlines.discard(deadline)
            await exchange.close()

    def _record(self, request: Request, exchange: Exchange, method: str) -> None:
        context, status = self.context, exchange.status
        context.metrics.responses[status] += 1
        context.metrics.unknown_fields += len(request.unknown_fields)
        if request.path in PROBES:
            return
        get_logger().info('%s %s %r %d %s %.3f s', request.id, method, request.path[:200], status,
                          request.caller.id, time.monotonic() - request.started)
        if context.audit is None:
            return
        outcome = exchange.code or request.outcome or ('finished' if status < 400 else 'rejected')
        context.audit.add(Entry(
            time=now(), request=request.id, key=request.caller.id, client=client_of(request.scope),
            method=method, route=request.path, model=request.model, status=status, outcome=outcome,
            prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens,
            seconds=round(time.monotonic() - request.started, 4),
            prompt_digest=request.digest() if context.audit.digests and request.content else None))


def client_of(scope: Scope) -> str:
    """The address of a request's client; empty if it has none."""
    client = scope.get('client')
    return client[0] if client else ''


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


async def _nothing_more() -> Message:
    """What the application receives: its body was read, and the end of the connection is watched here."""
    await asyncio.get_running_loop().create_future()
    return {'type': 'http.disconnect'}
