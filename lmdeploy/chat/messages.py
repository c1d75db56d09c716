"""Conversations: what a list of messages must look like, and plain copies of it."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from lmdeploy.errors import RequestError

ROLES = ('system', 'developer', 'user', 'assistant', 'tool', 'function', 'environment', 'ipython')
"""The roles that any conversation may use; a template may know others."""
MAX_DEPTH = 64
SURROGATE = re.compile('[\ud800-\udfff]')


class Segment(NamedTuple):
    """A piece of a rendered prompt.

    ``trusted`` text comes from the template: control tokens in it act. Untrusted text was typed by somebody else, and
    is text whatever it looks like.
    """

    text: str
    trusted: bool


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A plain, deep copy of the messages, so that rendering changes nobody's data.

    Every message has ``role`` and ``content``; the content is a text (None becomes ``''``) or a list of text parts.
    ``tool_calls``, ``name`` and further keys are kept as plain JSON values.

    Raises:
        RequestError: LMD-175 for a wrong shape, LMD-183 for parts that are not text.
    """
    if not isinstance(messages, (list, tuple)):
        raise RequestError('LMD-175', index=0, reason=f'the conversation is a {type(messages).__name__}, not a list')
    if not messages:
        raise RequestError('LMD-175', index=0, reason='the conversation is empty')
    return [_check(index, message) for index, message in enumerate(messages)]


def _check(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError('LMD-175', index=index, reason=f'it is a {type(message).__name__}, not a dict')
    role = message.get('role')
    if not isinstance(role, str):
        raise RequestError('LMD-175', index=index, reason='"role" is missing or not a text')
    if 'content' not in message and not message.get('tool_calls'):
        raise RequestError('LMD-175', index=index, reason='"content" is missing')
    calls = message.get('tool_calls')
    if calls is not None and not (isinstance(calls, (list, tuple)) and all(isinstance(c, dict) for c in calls)):
        raise RequestError('LMD-175', index=index, reason='"tool_calls" is not a list of dicts')
    plain_message = {key: plain(value, index) for key, value in message.items() if key != 'content'}
    plain_message['content'] = _content(index, message.get('content'))
    return plain_message


def _content(index: int, content: Any) -> str | list[dict[str, Any]]:
    if content is None:
        return ''
    if isinstance(content, str):
        return plain(content, index)
    if not isinstance(content, (list, tuple)):
        raise RequestError('LMD-175', index=index, reason=f'"content" is a {type(content).__name__}')
    parts = []
    for part in content:
        if not isinstance(part, dict):
            raise RequestError('LMD-175', index=index, reason=f'a content part is a {type(part).__name__}, not a dict')
        kind = part.get('type', 'text')
        if kind != 'text':
            raise RequestError('LMD-183', index=index, kind=str(kind))
        if not isinstance(part.get('text'), str):
            raise RequestError('LMD-175', index=index, reason='a content part has no "text"')
        parts.append({'type': 'text', 'text': plain(part['text'], index)})
    return parts


def plain(value: Any, index: int = 0, depth: int = 0) -> Any:
    """``value`` rebuilt of exact JSON types: templates see no object that has behaviour of its own.

    Raises:
        RequestError: LMD-175 for other types, for nesting beyond 64 levels and for text that is not valid Unicode.
    """
    if depth > MAX_DEPTH:
        raise RequestError('LMD-175', index=index, reason=f'it is nested more than {MAX_DEPTH} levels deep')
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        if not text.isascii() and SURROGATE.search(text):
            raise RequestError('LMD-175', index=index, reason='its text has a lone surrogate (not Unicode)')
        return text
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        return {plain(k, index, depth + 1): plain(v, index, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, index, depth + 1) for v in value]
    raise RequestError('LMD-175', index=index, reason=f'a value is a {type(value).__name__}, not plain JSON')


def get_text(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message's content; several text parts are lines."""
    if content is None:
        return ''
    if isinstance(content, str):
        return content
    return '\n'.join(part['text'] for part in content if part.get('type', 'text') == 'text')


def call_arguments(call: dict[str, Any]) -> Any:
    """The arguments of one tool call as an object; text that is not a JSON object stays text."""
    arguments = call.get('arguments', call.get('parameters', {}))
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments or '{}')
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
