"""The table of routes: each with its method, path, access and handler. What is not in it does not exist.

FastAPI routes to the handlers, gives them their arguments and describes them; how a body is read is ours
(:class:`StrictRoute`), and so is who may call what: :class:`Routes` tells the edge, which asks before a body is read.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from lmdeploy.serve.auth import Access
from lmdeploy.serve.body import Body, read
from lmdeploy.serve.errors import Failure, HttpError, failure
from lmdeploy.serve.http import REQUEST
from lmdeploy.serve.http import Request as OurRequest
from lmdeploy.serve.middleware import parse_json

Handler = Callable[..., Awaitable[Response]]
REFERENCE = '#/components/schemas/{name}'
LARGE_BODY = 64 << 10
"""Bytes; larger ones are read beside the event loop, one at a time."""
_readers = ThreadPoolExecutor(1, thread_name_prefix='lmdeploy-bodies')
SECURITY: list[dict[str, list[str]]] = [{'bearer': []}, {'key': []}]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.

    Attributes:
        handler: a coroutine function, or an object that is called like one; FastAPI fills its parameters in by their
            types: a :class:`lmdeploy.serve.body.Body`, a :class:`lmdeploy.serve.http.Request`, and the
            parts of the path by name.
        access: who may call it; there is no default.
        answer: the msgspec structure of a 200, for the documentation.
        failure: the response that tells of an error.
    """

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    answer: Any = None
    failure: Callable[[BaseException, str], Failure] = failure


@dataclass(slots=True)
class Routes:
    """The routes of one application, in the order in which they are tried."""

    _paths: dict[str, dict[str, Route]] = field(default_factory=dict)
    _patterns: list[tuple[re.Pattern[str], str]] = field(default_factory=list)

    def add(self, method: str, path: str, handler: Handler, access: Access, summary: str, *, answer: Any = None,
            failure: Callable[[BaseException, str], Failure] = failure) -> None:
        """Add a route; see :class:`Route`."""
        assert isinstance(access, Access)
        if path not in self._paths:
            self._paths[path] = {}
            if '{' in path:
                self._patterns.append((compile_path(path)[0], path))
        assert method not in self._paths[path], f'two routes for {method} {path}'
        self._paths[path][method] = Route(method, path, handler, access, summary, answer, failure)

    def __iter__(self) -> Iterator[Route]:
        return (route for methods in self._paths.values() for route in methods.values())

    def at(self, path: str) -> dict[str, Route]:
        """The routes of the path of a request, by method; none, if there is no such path."""
        found = self._paths.get(path)
        if found is not None and '{' not in path:
            return found
        return next((self._paths[name] for pattern, name in self._patterns if pattern.match(path)), {})

    def install(self, app: FastAPI) -> None:
        """Register all with ``app``, and make sure that it has no others."""
        for route in sorted(self, key=lambda route: '{' in route.path):  # FastAPI, too, tries exact paths first
            handler: Any = route.handler
            app.router.add_api_route(
                route.path, handler if inspect.isroutine(handler) else handler.__call__,  # what has the annotations
                methods=[route.method], summary=route.summary, response_model=None, response_class=Response,
                responses=_responses(route), route_class_override=StrictRoute,
                operation_id=f'{route.method.lower()}_{re.sub("[^a-zA-Z0-9]+", "_", route.path).strip("_")}',
                openapi_extra={} if route.access is Access.OPEN else {'security': SECURITY})
        strangers = [route for route in app.router.routes if not isinstance(route, StrictRoute)]
        assert not strangers, f'routes without an access: {strangers}'


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    answer: dict[str, Any] = {'description': 'done'}
    if route.answer is not None:
        (schema,), _ = msgspec.json.schema_components([route.answer], ref_template=REFERENCE)
        answer['content'] = {'application/json': {'schema': schema}}
    return {200: answer, 'default': {'description': 'an error', 'content': {
        'application/json': {'schema': {'type': 'object'}}}}}


class StrictRoute(APIRoute):
    """Reads a body once, by :func:`lmdeploy.serve.body.read` from strictly parsed JSON; FastAPI gets the
    object that came of it, and has nothing left to validate or to say in its own words."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()
        kind: Any = None if self.body_field is None else self.body_field.field_info.annotation
        assert kind is None or issubclass(kind, Body), f'{self.path}: a body is a Body, not {kind}'
        names = [part.name for part in self.dependant.query_params]
        # There are none so far; what FastAPI takes for one has a type that it could not find by its name.
        assert not names, f'{self.path}: {names} are no parameters of a query'

        async def handle(plain: Request) -> Response:
            request: OurRequest = plain.scope[REQUEST]
            request.scope = plain.scope
            if kind is not None:
                request.value, request.unknown_fields = await _read(kind, request)
            try:
                return await handler(request)
            except RequestValidationError as error:  # of the path: the body is past that
                problem = error.errors()[0]
                raise HttpError('LMD-512', param=str(problem['loc'][-1]), reason=problem['msg']) from None

        return handle


async def _read(kind: type[Body], request: OurRequest) -> tuple[Body, tuple[str, ...]]:
    """The body as ``kind``, and which of its fields were unknown."""
    def parse() -> tuple[Body, tuple[str, ...]]:
        return read(kind, parse_json(request.content, request.limits))

    if len(request.content) <= LARGE_BODY:
        return parse()
    return await asyncio.get_running_loop().run_in_executor(_readers, parse)
