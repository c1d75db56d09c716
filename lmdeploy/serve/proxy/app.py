"""The application of the proxy: what it answers itself, and what it passes on."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable

from lmdeploy.serve.anthropic.events import error_event as message_error_event
from lmdeploy.serve.anthropic.events import message_failure
from lmdeploy.serve.app import App
from lmdeploy.serve.auth import Access
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Request, Response, Stream, json_reply
from lmdeploy.serve.ledger import Outcome
from lmdeploy.serve.middleware import parse_json
from lmdeploy.serve.openai.answers import ModelCard, ModelList, ModelPermission
from lmdeploy.serve.operations import EXPOSITION, HealthInfo
from lmdeploy.serve.proxy import asked
from lmdeploy.serve.proxy.context import ProxyContext
from lmdeploy.serve.proxy.forward import Begun, Call, Passage, first_of
from lmdeploy.serve.proxy.metrics import ProxyExposition
from lmdeploy.serve.proxy.registry import Done, Registry
from lmdeploy.serve.routes import Routes
from lmdeploy.serve.sse import error_event

PASSED = {
    '/v1/chat/completions': 'answer a conversation',
    '/v1/completions': 'continue texts',
    '/v1/embeddings': 'texts as vectors',
    '/v1/responses': "answer in the form of OpenAI's Responses",
    '/v1/encode': 'texts to tokens',
    '/generate': 'one answer with its tokens',
    '/tokenize': 'a text or a conversation to tokens',
    '/detokenize': 'tokens to a text',
}
"""What goes to a node. Routes whose answers depend on what a node remembers are not among them."""
PASSED_MESSAGES = {
    '/v1/messages': 'answer in the form of Anthropic',
    '/v1/messages/count_tokens': 'count the tokens of a conversation',
}


def create_app(context: ProxyContext) -> App:
    """The ASGI application of a proxy."""
    routes, own, registry = Routes(), Own(context), Registry(context)
    for path, summary in PASSED.items():
        routes.add('POST', path, Through(context), Access.USER, summary)
    for path, summary in PASSED_MESSAGES.items():
        routes.add('POST', path, Through(context, message_error_event), Access.USER, summary, failure=message_failure)
    routes.add('GET', '/v1/models', own.models, Access.USER, 'the models that nodes serve', answer=ModelList)
    routes.add('GET', '/v1/models/{model:path}', own.model, Access.USER, 'one of them', answer=ModelCard)
    routes.add('GET', '/health', own.health, Access.OPEN, 'the proxy is there', answer=HealthInfo)
    routes.add('GET', '/ready', own.ready, Access.OPEN, 'whether a node is there', answer=HealthInfo)
    routes.add('GET', '/metrics', own.metrics, Access.OPEN if context.public_metrics else Access.USER,
               'Prometheus metrics')
    routes.add('GET', '/nodes/status', registry.status, Access.ADMIN, 'the nodes')
    routes.add('POST', '/nodes/add', registry.add, Access.ADMIN, 'register a node', answer=Done)
    routes.add('POST', '/nodes/remove', registry.remove, Access.ADMIN, 'forget a node', answer=Done)
    routes.add('POST', '/nodes/terminate', registry.terminate, Access.ADMIN, 'shut a node down', answer=Done)
    for method in ('GET', 'POST'):
        routes.add(method, '/nodes/terminate_all', registry.terminate_all, Access.ADMIN, 'shut all nodes down',
                   answer=Done)
    return App(context, routes, title='lmdeploy proxy', docs=context.docs)


class Own:
    """What the proxy says of itself."""

    def __init__(self, context: ProxyContext) -> None:
        self.context = context
        self._exposition = ProxyExposition(context.metrics, context.nodes)

    async def models(self) -> Response:
        """The models of all nodes that are up."""
        return json_reply(ModelList(data=[self._card(name) for name in self.context.nodes.models()]))

    async def model(self, model: str) -> Response:
        """A model that a node serves."""
        served = self.context.nodes.models()
        if model not in served:
            raise HttpError('LMD-514', model=model[:200], served=', '.join(served)[:1000], param='model')
        return json_reply(self._card(model))

    async def health(self) -> Response:
        """200 as long as the proxy runs."""
        return json_reply(HealthInfo('healthy', ''))

    async def ready(self) -> Response:
        """200 while requests are taken and there is a node for them; else 503."""
        if self.context.draining:
            return json_reply(HealthInfo('draining', 'the proxy is shutting down'), 503)
        if not self.context.nodes.models():
            return json_reply(HealthInfo('unhealthy', 'no node is up'), 503)
        return json_reply(HealthInfo('ready', ''))

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._exposition.render(), media_type=EXPOSITION)

    def _card(self, name: str) -> ModelCard:
        created = self.context.created
        permission = ModelPermission(id=f'modelperm-{hashlib.sha256(name.encode()).hexdigest()[:24]}', created=created)
        return ModelCard(id=name, created=created, root=name, permission=[permission])


class Through:
    """The handler of what is passed on: the body goes to a node as it came, and the answer comes back as it is.

    Args:
        event: the last event of a stream that breaks.
    """

    def __init__(self, context: ProxyContext, event: Callable[[BaseException, str], bytes] = error_event) -> None:
        self.context, self._event = context, event

    async def __call__(self, request: Request) -> Response:
        context = self.context
        if context.draining:
            raise HttpError('LMD-520', retry_after=5)
        facts = asked.read(parse_json(request.content, context.limits), request.caller.id)
        request.model = facts.model or ''
        call = Call(request.path, request.scope['headers'], request.content, facts, request.id, request.caller.id)
        passage = Passage()
        chunks = self._pass(request, call, passage)
        try:
            first = await first_of(chunks)
        except BaseException:
            await chunks.aclose()
            raise
        if first is None:
            response = Response(status_code=passage.status)
            response.raw_headers = [*passage.headers]
            return response
        event = (lambda error: self._event(error, request.id)) if passage.events else None
        stream = Stream(Begun(first, chunks), event, status=passage.status, paced=True)
        stream.raw_headers = passage.headers
        return stream

    async def _pass(self, request: Request, call: Call, passage: Passage) -> AsyncGenerator[bytes, None]:
        """The bytes of the answer; its head is in ``passage`` before the first of them."""
        context = self.context
        async with context.admission.enter(request.caller, 1):
            context.metrics.accept()
            outcome: Outcome = 'cancelled'
            try:
                await context.forwarder.send(call, passage)
                body = context.forwarder.body(call, passage)
                try:
                    async for chunk in body:
                        yield chunk
                finally:
                    await body.aclose()
                outcome = 'finished'
            except Exception:  # whatever it is, it is counted; the edge tells the client
                outcome = 'failed'
                raise
            finally:
                context.metrics.end(outcome)
