"""``/openapi.json`` and ``/docs``: the description of the interface, for tools and for readers.

The page is static: without scripts and without anything from other machines.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

from starlette.responses import HTMLResponse, Response

POLICY = {'content-security-policy': "default-src 'none'; style-src 'unsafe-inline'"}
STYLE = ('body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}'
         'details{border:1px solid #ddd;border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}'
         'summary{cursor:pointer}code,pre{font:13px/1.4 ui-monospace,monospace}pre{overflow:auto;background:#f6f6f6;'
         'padding:.6rem}table{border-collapse:collapse}td,th{text-align:left;padding:.15rem .8rem .15rem 0;'
         'vertical-align:top}b{display:inline-block;min-width:3.5rem}i{color:#777}')


class Docs:
    """The handlers. The pages are made once, when they are first asked for.

    Args:
        describe: makes the OpenAPI description.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]]) -> None:
        self._describe = describe
        self._document = b''
        self._page = ''

    async def document(self) -> Response:
        """The description, for tools."""
        if not self._document:
            self._document = json.dumps(self._describe()).encode()
        return Response(self._document, media_type='application/json')

    async def page(self) -> Response:
        """The same for readers."""
        if not self._page:
            self._page = render(self._describe())
        return HTMLResponse(self._page, headers=POLICY)


def render(document: dict[str, Any]) -> str:
    """An OpenAPI description as a page."""
    info = document['info']
    title = _text(f'{info["title"]} {info["version"]}')
    operations = [_operation(document, method, path, operation)
                  for path, methods in document['paths'].items() for method, operation in methods.items()]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
            f'<h1>{title}</h1><p>OpenAPI description: <a href="/openapi.json">/openapi.json</a>. '
            f'A key goes into <code>Authorization: Bearer KEY</code> or <code>x-api-key: KEY</code>.</p>'
            + ''.join(operations) + '</html>')


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    fields = ''
    if 'requestBody' in operation:
        name = operation['requestBody']['content']['application/json']['schema']['$ref'].rsplit('/', 1)[1]
        schema = document['components']['schemas'][name]
        fields = f'<p>{_text(schema.get("description", ""))}</p><table><tr><th>field<th>type<th>default' + ''.join(
            f'<tr><td><code>{_text(name)}</code><td>{_text(_type(spec))}<td><code>'
            f'{_text("required" if name in schema.get("required", ()) else json.dumps(spec.get("default")))}</code>'
            for name, spec in schema['properties'].items()) + '</table>'
    access = '' if 'security' in operation else ' <i>open</i>'
    return (f'<details><summary><b>{method.upper()}</b> <code>{_text(path)}</code> '
            f'{_text(operation["summary"])}{access}</summary>{fields}</details>')


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
