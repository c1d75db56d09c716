"""``response_format``: its forms, and the grammar source that each of them becomes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from lmdeploy.errors import RequestError
from lmdeploy.grammar.limits import MAX_BYTES, Budget, too_large
from lmdeploy.grammar.regex import scan, shortened
from lmdeploy.grammar.schema import check_schema

FORMS = ("{'type': 'text'}, {'type': 'json_object'}, {'type': 'regex_schema', 'regex_schema': '...'}, "
         "{'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}}")
ANY_OBJECT = {'type': 'object'}
WRAPPING = frozenset({'name', 'description', 'strict', 'schema', 'json_schema'})  # keys around a schema, not of one


@dataclass(frozen=True, slots=True)
class Source:
    """A checked grammar as text: small, comparable, and the same in every process."""

    kind: Literal['json', 'regex']
    text: str


def read_format(response_format: Any) -> Source | None:
    """What a request's ``response_format`` asks for; None where it does not constrain the answer.

    The schema may also stand directly under ``json_schema``, and be given as JSON text.

    Raises:
        RequestError: LMD-320 (not one of the forms), LMD-321 to LMD-324 (its schema or regular expression).
    """
    if response_format is None:
        return None
    kind = response_format.get('type') if isinstance(response_format, dict) else None
    known = {'text': (), 'json_object': (), 'json_schema': ('json_schema',), 'regex_schema': ('regex_schema',)}
    if not isinstance(kind, str) or kind not in known:
        raise _unknown(response_format)
    given = {name for name, value in response_format.items() if value is not None and name != 'type'}
    if given != set(known[kind]):
        raise _unknown(response_format)
    if kind == 'text':
        return None
    if kind == 'regex_schema':
        return regex_source(response_format['regex_schema'])
    return schema_source(ANY_OBJECT if kind == 'json_object' else _schema_of(response_format))


def regex_source(pattern: Any) -> Source:
    """A grammar for exactly the texts that a regular expression matches as a whole."""
    if not isinstance(pattern, str):
        raise _unknown({'type': 'regex_schema', 'regex_schema': pattern})
    try:
        pattern.isascii() or pattern.encode()
    except UnicodeEncodeError as error:
        raise RequestError('LMD-324', pattern='...', position=error.start,
                           reason='a lone surrogate is no character') from error
    return Source('regex', scan(pattern, Budget(), translate=True))


def schema_source(schema: Any) -> Source:
    """A grammar for the JSON texts of a schema's instances."""
    return Source('json', json.dumps(check_schema(schema), ensure_ascii=False, separators=(',', ':')))


def _schema_of(response_format: dict[str, Any]) -> Any:
    given = response_format['json_schema']
    if isinstance(given, dict) and WRAPPING.issuperset(given):
        if not isinstance(given.get('strict'), (bool, type(None))) or not isinstance(given.get('name', ''), str):
            raise _unknown(response_format)
        wrapped = [given[name] for name in ('schema', 'json_schema') if given.get(name) is not None]
        if len(wrapped) > 1:
            raise _unknown(response_format)
        given = wrapped[0] if wrapped else {} if not given else None
    if isinstance(given, str):
        if len(given) > MAX_BYTES:
            raise too_large('size in bytes', len(given), MAX_BYTES)
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise RequestError('LMD-323', where='#', reason=f'it is no JSON: {error}') from error
    if not isinstance(given, (dict, bool)):
        raise _unknown(response_format)
    return given


def _unknown(given: Any) -> RequestError:
    if isinstance(given, dict):  # of a huge one, only the beginning is ever spelled out
        given = {name: value if isinstance(value, (str, int, float, bool, type(None))) else f'<{type(value).__name__}>'
                 for name, value in list(given.items())[:4] if isinstance(name, str)}
        given = {name: value[:40] if isinstance(value, str) else value for name, value in given.items()}
    else:
        given = type(given).__name__
    return RequestError('LMD-320', given=shortened(str(given)), forms=FORMS)
