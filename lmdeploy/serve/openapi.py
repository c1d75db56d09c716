"""``/openapi.json`` and ``/docs``: the routes as they are in the table, without anything from other machines."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from lmdeploy.serve.auth import Access
from lmdeploy.serve.http import Reply, Request
from lmdeploy.serve.routes import Route, Router
from lmdeploy.version import __version__

REFERENCE = '#/components/schemas/{model}'
HTML = ((b'content-type', b'text/html; charset=utf-8'),
        (b'content-security-policy', b"default-src 'none'; style-src 'unsafe-inline'"))
STYLE = ('body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}'
         'details{border:1px solid #ddd;border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}'
         'summary{cursor:pointer}code,pre{font:13px/1.4 ui-monospace,monospace}pre{overflow:auto;background:#f6f6f6;'
         'padding:.6rem}table{border-collapse:collapse}td,th{text-align:left;padding:.15rem .8rem .15rem 0;'
         'vertical-align:top}b{display:inline-block;min-width:3.5rem}i{color:#777}')


def document(router: Router, models: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of all routes; ``models`` are the values of every field ``model``."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for route in router:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas, models)
    return {
        'openapi': '3.1.0',
        'info': {'title': 'lmdeploy', 'version': __version__},
        'paths': paths,
        'components': {'schemas': schemas, 'securitySchemes': {
            'bearer': {'type': 'http', 'scheme': 'bearer'},
            'key': {'type': 'apiKey', 'in': 'header', 'name': 'x-api-key'}}},
    }


def _operation(route: Route, schemas: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    answer: dict[str, Any] = {'description': 'done'}
    if route.answer is not None:
        (schema,), found = msgspec.json.schema_components([route.answer], ref_template='#/components/schemas/{name}')
        schemas.update(found)
        answer['content'] = {'application/json': {'schema': schema}}
    operation: dict[str, Any] = {
        'summary': route.summary,
        'operationId': f'{route.method.lower()}_{route.path.strip("/").replace("/", "_")}',
        'responses': {'200': answer, 'default': {'description': 'an error', 'content': {
            'application/json': {'schema': {'type': 'object'}}}}},
    }
    if route.access is not Access.OPEN:
        operation['security'] = [{'bearer': []}, {'key': []}]
    if route.body is not None:
        schema = route.body.model_json_schema(ref_template=REFERENCE)
        schemas.update(schema.pop('$defs', {}))
        if 'model' in schema['properties']:
            schema['properties']['model']['enum'] = list(models)
        schemas[route.body.__name__] = schema
        operation['requestBody'] = {'required': True, 'content': {
            'application/json': {'schema': {'$ref': REFERENCE.format(model=route.body.__name__)}}}}
    return operation


class Docs:
    """The handlers. The pages are made once, when they are first asked for."""

    def __init__(self, models: Sequence[str]) -> None:
        self.router = Router(())
        self._models = models
        self._document = b''
        self._page = b''

    async def openapi(self, request: Request) -> Reply:
        """The description, for tools."""
        if not self._document:
            self._document = json.dumps(document(self.router, self._models)).encode()
        return Reply(self._document)

    async def page(self, request: Request) -> Reply:
        """The same for readers: static, and without scripts."""
        if not self._page:
            self._page = _page(self.router).encode()
        return Reply(self._page, headers=HTML)


def _page(router: Router) -> str:
    rows = []
    for route in router:
        fields = ''
        if route.body is not None:
            schema = route.body.model_json_schema()
            fields = f'<p>{_text(schema.get("description", ""))}</p><table><tr><th>field<th>type<th>default' + ''.join(
                f'<tr><td><code>{_text(name)}</code><td>{_text(_type(spec))}<td><code>'
                f'{_text("required" if name in schema.get("required", ()) else json.dumps(spec.get("default")))}</code>'
                for name, spec in schema['properties'].items()) + '</table>'
        rows.append(f'<details><summary><b>{route.method}</b> <code>{_text(route.path)}</code> {_text(route.summary)} '
                    f'<i>{route.access.value}</i></summary>{fields}</details>')
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>lmdeploy API</title><style>{STYLE}</style>'
            f'<h1>lmdeploy {__version__}</h1><p>OpenAPI description: <a href="/openapi.json">/openapi.json</a>. '
            f'A key goes into <code>Authorization: Bearer KEY</code> or <code>x-api-key: KEY</code>.</p>'
            + ''.join(rows) + '</html>')


def _text(value: str) -> str:
    return html.escape(value)


def _type(spec: dict[str, Any]) -> str:
    if 'anyOf' in spec:
        return ' or '.join(_type(one) for one in spec['anyOf'])
    if 'items' in spec:
        return f'list of {_type(spec["items"])}'
    if '$ref' in spec:
        return spec['$ref'].rsplit('/', 1)[-1]
    if 'enum' in spec:
        return ' | '.join(map(json.dumps, spec['enum']))
    kind = str(spec.get('type', spec.get('const', 'any')))
    bounds = [f'{sign} {spec[name]}' for name, sign in (('minimum', '≥'), ('exclusiveMinimum', '>'), ('maximum', '≤'),
                                                        ('exclusiveMaximum', '<')) if name in spec]
    return ' '.join([kind, *bounds])
