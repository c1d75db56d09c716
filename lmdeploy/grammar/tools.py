"""Grammars for tool calls that a request forces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy.errors import RequestError
from lmdeploy.grammar.limits import Budget
from lmdeploy.grammar.schema import check_schema

NO_PARAMETERS = {'type': 'object', 'properties': {}, 'additionalProperties': False}


def required_calls(tools: Sequence[dict[str, Any]], *, parallel: bool = True) -> dict[str, Any]:
    """The ``response_format`` for ``tool_choice='required'``: a JSON array of ``{"name": ..., "parameters": {...}}``.

    Args:
        tools: in OpenAI's form, ``{'type': 'function', 'function': {'name': ..., 'parameters': schema}}``.
        parallel: allow more than one call.

    Raises:
        RequestError: LMD-321 to LMD-324 (a tool's schema), LMD-329 (not a tool).
    """
    budget = Budget()
    definitions: dict[str, Any] = {}
    calls = []
    for i, (name, parameters) in enumerate(map(_function, tools)):
        definitions[f'tool{i}'] = check_schema(parameters, base=f'/$defs/tool{i}', budget=budget)
        calls.append({
            'type': 'object',
            'properties': {'name': {'const': name}, 'parameters': {'$ref': f'#/$defs/tool{i}'}},
            'required': ['name', 'parameters'],
            'additionalProperties': False,
        })
    if not calls:
        raise RequestError('LMD-329', given='[]')
    schema = {'type': 'array', 'items': {'anyOf': calls}, 'minItems': 1, '$defs': definitions}
    if not parallel:
        schema['maxItems'] = 1
    return {'type': 'json_schema', 'json_schema': {'name': 'tool_calls', 'schema': schema}}


def named_call(tools: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The ``response_format`` for a ``tool_choice`` that names a function: its parameters object alone.

    Raises:
        RequestError: LMD-321 to LMD-324 (the tool's schema), LMD-329 (there is no such tool).
    """
    for found, parameters in map(_function, tools):
        if found == name:
            return {'type': 'json_schema', 'json_schema': {'name': 'parameters', 'schema': check_schema(parameters)}}
    raise RequestError('LMD-329', given=repr(name)[:80])


def _function(tool: Any) -> tuple[str, Any]:
    """Name and parameter schema of a tool."""
    function = tool.get('function') if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get('name'), str) or not function['name']:
        raise RequestError('LMD-329', given=repr(tool)[:80])
    parameters = function.get('parameters')
    return function['name'], NO_PARAMETERS if parameters in (None, {}) else parameters
