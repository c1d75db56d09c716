"""The application: FastAPI over a table of routes, behind the edge; its description and the page that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware import Middleware

from lmdeploy.serve.auth import Access
from lmdeploy.serve.docs import Docs
from lmdeploy.serve.edge import Edge, EdgeContext
from lmdeploy.serve.routes import REFERENCE, Routes
from lmdeploy.version import __version__

SCHEMES = {'bearer': {'type': 'http', 'scheme': 'bearer'},
           'key': {'type': 'apiKey', 'in': 'header', 'name': 'x-api-key'}}


class App(FastAPI):
    """An application over ``routes``.

    FastAPI's own pages are off: they load their scripts from other machines, which a machine without a network cannot,
    and a page that holds a key should not.

    Args:
        context: what the edge knows of the server.
        docs: serve ``/openapi.json`` and ``/docs`` too.
        models: the names that a field ``model`` may have, for the description.
    """

    def __init__(self, context: EdgeContext, routes: Routes, *, title: str = 'lmdeploy', docs: bool = True,
                 models: Sequence[str] = ()) -> None:
        super().__init__(title=title, version=__version__, openapi_url=None, docs_url=None, redoc_url=None,
                         redirect_slashes=False, middleware=[Middleware(Edge, context=context, routes=routes)])
        self.table = routes
        self.state.context = context
        self._models = list(models)
        if docs:
            pages = Docs(self.openapi)
            routes.add('GET', '/openapi.json', pages.document, Access.USER, 'this interface, for tools')
            routes.add('GET', '/docs', pages.page, Access.USER, 'this interface, for readers')
        routes.install(self)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description: FastAPI's, with the structures of answers and the kinds of keys."""
        if self.openapi_schema is None:
            found = get_openapi(title=self.title, version=self.version, routes=self.routes)
            parts = found.setdefault('components', {})
            schemas = parts.setdefault('schemas', {})
            answers = [route.answer for route in self.table if route.answer is not None]
            schemas.update(msgspec.json.schema_components(answers, ref_template=REFERENCE)[1])
            parts['securitySchemes'] = SCHEMES
            self._complete(found)
            self.openapi_schema = found
        return self.openapi_schema

    def _complete(self, found: dict[str, Any]) -> None:
        """Say what the bodies' types leave open: the models that there are, and which answers may be streams."""
        for path in found['paths'].values():
            for operation in path.values():
                if 'requestBody' not in operation:
                    continue
                name = operation['requestBody']['content']['application/json']['schema']['$ref'].rsplit('/', 1)[1]
                fields = found['components']['schemas'][name]['properties']
                if 'model' in fields and self._models:
                    fields['model']['enum'] = self._models
                if 'stream' in fields:
                    operation['responses']['200']['content']['text/event-stream'] = {}
