"""The application over a table of routes: what FastAPI does, and what it must not do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import httpx
import pytest
from pydantic import BaseModel
from starlette.responses import PlainTextResponse

from lmdeploy.serve.app import App
from lmdeploy.serve.audit import AuditLog
from lmdeploy.serve.auth import Access, KeyRing
from lmdeploy.serve.body import Body
from lmdeploy.serve.deadline import Deadline
from lmdeploy.serve.errors import Failure
from lmdeploy.serve.http import Request, Response, Stream, json_reply
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.metrics import ServerMetrics
from lmdeploy.serve.middleware import Cors
from lmdeploy.serve.routes import Routes
from tests.serve.test_edge import shape


@dataclass
class Context:
    """The least that the edge asks for."""

    keys: KeyRing = field(default_factory=lambda: KeyRing(['key'], ['boss']))
    limits: Limits = field(default_factory=Limits)
    cors: Cors = field(default_factory=Cors)
    check_host: bool = False
    audit: AuditLog | None = None
    deadlines: set[Deadline] = field(default_factory=set)
    metrics: ServerMetrics = field(default_factory=ServerMetrics)


class Thing(Body):
    """A thing."""

    size: int = 1


class Loose(BaseModel):
    """A body that converts what it gets."""

    size: int = 1


async def loose(body: Loose) -> Response:
    return json_reply(body.size)


class Handlers:
    """Of every kind that there is."""

    async def create(self, body: Thing, request: Request) -> Response:
        return json_reply({'size': body.size, 'caller': request.caller.id, 'bytes': len(request.content)})

    async def get(self, thing_id: int) -> Response:
        return json_reply({'thing': thing_id})

    async def plain(self) -> Response:
        return PlainTextResponse('text')

    async def stream(self, request: Request) -> Response:
        async def chunks():
            yield b'one,'
            if request.query_params.get('fail'):
                raise ValueError('inside')
            yield b'two'

        return Stream(chunks(), lambda error: b'broken', status=202, headers={'content-type': 'text/csv'})

    async def fail(self) -> Response:
        raise ValueError('inside')


def application() -> App:
    routes, handlers = Routes(), Handlers()
    routes.add('POST', '/things', handlers.create, Access.USER, 'make one')
    routes.add('GET', '/things/{thing_id}', handlers.get, Access.ADMIN, 'look at one')
    routes.add('GET', '/things/all', handlers.plain, Access.OPEN, 'look at all')
    routes.add('GET', '/stream', handlers.stream, Access.USER, 'in pieces')
    routes.add('GET', '/fail', handlers.fail, Access.USER, 'cannot',
               failure=lambda error, request_id: Failure(555, type(error).__name__.encode(), 'own'))
    return App(Context(), routes, title='things')


def ask(app: App, method: str, path: str, key: str = 'key', **options) -> httpx.Response:
    async def one() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://a',
                                     headers={'x-api-key': key}) as http:
            return await http.request(method, path, **options)

    return asyncio.run(one())


def test_handlers_get_what_their_types_ask_for():
    app = application()
    made = ask(app, 'POST', '/things', json={'size': 3, 'colour': 'red'}).json()
    assert (made['size'], made['bytes']) == (3, 25) and made['caller'].startswith('key-')
    assert app.state.context.metrics.unknown_fields == 1
    assert ask(app, 'GET', '/things/7', 'boss').json() == {'thing': 7}
    assert ask(app, 'GET', '/things/all', 'wrong').text == 'text'  # the exact path comes first, with its own access


def test_bodies_are_refused_in_our_words_only():
    app = application()
    for content, code in ((b'{"size": NaN}', 'invalid_json'), (b'', 'invalid_json'), (b'[1]', 'invalid_request'),
                          (b'{"size": "3"}', 'invalid_request'), (b'{"size": true}', 'invalid_request'),
                          (b'[' * 100_000, 'invalid_json')):
        shape(ask(app, 'POST', '/things', content=content, headers={'content-type': 'application/json'}), 400, code)
    assert shape(ask(app, 'GET', '/things/x', 'boss'), 400, 'invalid_request')['param'] == 'thing_id'


def test_access_is_asked_for_before_the_path_and_the_method_are_looked_at():
    app = application()
    for method, path in (('GET', '/things/7'), ('PUT', '/things/7'), ('GET', '/none'), ('PUT', '/things/all')):
        assert ask(app, method, path, 'wrong').status_code == 401
    shape(ask(app, 'GET', '/things/7'), 403, 'admin_key_required')
    refused = ask(app, 'DELETE', '/things')
    assert shape(refused, 405, 'method_not_allowed') and refused.headers['allow'] == 'POST'
    for path in ('/things/', '/things/1/2', '/things/1%2F2', '/redoc', '/static'):
        shape(ask(app, 'GET', path, 'boss'), 404, 'not_found')


def test_head_is_get_without_a_body():
    app = application()
    head = ask(app, 'HEAD', '/things/all')
    assert (head.status_code, head.content, head.headers['content-length']) == (200, b'', '4')
    shape(ask(app, 'GET', '/things'), 405, 'method_not_allowed')


def test_streams_and_failures_in_them():
    app = application()
    whole = ask(app, 'GET', '/stream')
    assert (whole.status_code, whole.text, whole.headers['content-type']) == (202, 'one,two', 'text/csv')
    assert whole.headers['x-request-id'] and whole.headers['x-content-type-options'] == 'nosniff'
    assert ask(app, 'GET', '/stream?fail=1').text == 'one,broken'


def test_what_a_handler_raises_ends_at_the_edge_in_the_form_of_its_route():
    app = application()
    failed = ask(app, 'GET', '/fail')
    assert (failed.status_code, failed.text) == (555, 'ValueError')
    assert app.state.context.metrics.rejected['own'] == 1


def test_the_description_is_fastapi_s_with_our_keys():
    app = application()
    document = ask(app, 'GET', '/openapi.json').json()
    assert document['info']['title'] == 'things'
    assert document['components']['schemas']['Thing']['properties']['size']['type'] == 'integer'
    assert 'security' in document['paths']['/things']['post'] and '422' not in document['paths']['/things']['post']
    assert 'security' not in document['paths']['/things/all']['get']
    assert document['paths']['/things/{thing_id}']['get']['parameters'][0]['name'] == 'thing_id'


def test_what_has_no_access_or_no_strict_body_does_not_start():
    routes = Routes()
    routes.add('POST', '/loose', loose, Access.USER, 'not strict')
    with pytest.raises(AssertionError, match=r'a body is a Body'):
        App(Context(), routes)

    class Hidden(Body):
        size: int = 1

    async def hidden(body: Hidden) -> Response:  # a type that is not to be found by its name
        return json_reply(body.size)

    other = Routes()
    other.add('POST', '/hidden', hidden, Access.USER, 'its body would be taken for a query')
    with pytest.raises(AssertionError, match='no parameters of a query'):
        App(Context(), other)
    with pytest.raises(AssertionError, match='two routes'):
        routes.add('POST', '/loose', loose, Access.OPEN, 'again')

    class Smuggler(Routes):
        def install(self, app):
            app.add_api_route('/back_door', loose)
            super().install(app)

    with pytest.raises(AssertionError, match='without an access'):
        App(Context(), Smuggler())
