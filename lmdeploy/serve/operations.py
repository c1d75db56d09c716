"""Routes about the server itself: health, readiness, metrics, and the end of running requests."""

from __future__ import annotations

import asyncio

import msgspec

from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Request, Response, json_reply
from lmdeploy.serve.metrics import Exposition
from lmdeploy.serve.openai.protocol import AbortRequest

STATUS = {'ready': 'healthy', 'loading': 'initializing', 'sleeping': 'sleeping'}
EXPOSITION = 'text/plain; version=0.0.4; charset=utf-8'


class HealthInfo(msgspec.Struct):
    """``status``: healthy, initializing, sleeping or unhealthy; ``message`` says why it is not healthy."""

    status: str
    message: str


class Aborted(msgspec.Struct):
    """How many requests were told to end."""

    aborted: int


class Operations:
    """The handlers, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self._exposition = Exposition(context.metrics, context.stats, context.model_names[0],
                                      lambda: context.admission.queued)

    async def health(self) -> Response:
        """200 as long as the engine serves, or is asleep because somebody said so; else 503."""
        health = self.context.engine.health()
        status = STATUS.get(health.state, 'unhealthy')
        info = HealthInfo(status, '' if status == 'healthy' else f'{health.state}: {health.reason}'[:300])
        return json_reply(info, 200 if status in ('healthy', 'sleeping') else 503)

    async def ready(self) -> Response:
        """200 while new requests are taken; else 503."""
        if self.context.draining:
            return json_reply(HealthInfo('draining', 'the server is shutting down'), 503)
        health = self.context.engine.health()
        if health.state != 'ready' or self.context.engine.frontend is None:
            return json_reply(HealthInfo(STATUS.get(health.state, 'unhealthy'), health.state), 503)
        return json_reply(HealthInfo('ready', ''))

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        audit = self.context.audit
        self.context.metrics.audit_dropped = audit.dropped if audit is not None else 0
        return Response(self._exposition.render(), media_type=EXPOSITION)

    async def abort(self, body: AbortRequest, request: Request) -> Response:
        """End running requests of the caller, by session id or ``x-request-id``, or all; an admin key reaches those of
        others too. Unknown ids and those of others are answered alike."""
        if not body.abort_all and body.session_id is None and body.request_id is None:
            raise HttpError('LMD-512', param='session_id', reason='give session_id, request_id or abort_all')
        caller = request.caller
        found = [running for running in self.context.running
                 if not running.aborted and (caller.admin or running.caller == caller.id)
                 and (body.abort_all or running.session_id == body.session_id or running.request_id == body.request_id)]
        if not found and not body.abort_all:
            raise HttpError('LMD-525')
        for running in found:
            running.abort()
        return json_reply(Aborted(len(found)))

    async def sleep(self, request: Request) -> Response:
        """Give the engine's memory back until ``/wakeup``; running requests are aborted. Both of LMDeploy's levels give
        all of it back."""
        _check_query(request, 'level', ('1', '2'))
        if self.context.engine.health().state != 'sleeping':
            await self.context.engine.sleep()
        return json_reply(HealthInfo('sleeping', ''))

    async def wakeup(self, request: Request) -> Response:
        """Load the model again; answers when it is ready. Whichever of LMDeploy's tags are given, all of it wakes."""
        _check_query(request, 'tags', ('weights', 'kv_cache'))
        await self.context.engine.wakeup()
        return json_reply(HealthInfo('ready', ''))

    async def terminate(self) -> Response:
        """Shut the server down as SIGTERM does, after this response."""
        assert self.context.terminate is not None
        asyncio.get_running_loop().call_soon(self.context.terminate)
        return json_reply(HealthInfo('draining', 'the server is shutting down'))

    async def is_sleeping(self) -> Response:
        """``{"is_sleeping": bool}``."""
        return json_reply({'is_sleeping': self.context.engine.health().state == 'sleeping'})


def _check_query(request: Request, name: str, values: tuple[str, ...]) -> None:
    """Refuse what a query asks for beyond ``name``, which may have these values.

    Raises:
        HttpError: LMD-512, LMD-513.
    """
    for key, value in request.query_params.multi_items():
        if key != name:
            raise HttpError('LMD-513', param=key[:100], reason=f'the query may have {name}')
        if value not in values:
            raise HttpError('LMD-512', param=name, reason=f'it must be {" or ".join(values)}')
