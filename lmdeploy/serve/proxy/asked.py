"""What the proxy reads of a request's body: its model, whether it streams, and how its prompt begins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from lmdeploy.serve.errors import HttpError

PREFIX_CHARS = 1024
"""Requests whose prompts agree in so many characters go together."""
MAX_MODEL = 512


@dataclass(frozen=True, slots=True)
class Asked:
    """The routing facts of a request.

    Attributes:
        affinity: of requests that begin alike and come from the same caller; empty: there is no prompt.
    """

    model: str | None
    stream: bool
    affinity: bytes


def read(body: Any, caller: str) -> Asked:
    """The facts of a JSON body.

    Raises:
        HttpError: LMD-512, it is no object, or its model no text.
    """
    if not isinstance(body, dict):
        raise HttpError('LMD-512', param='body', reason='it must be a JSON object')
    model = body.get('model')
    if model is not None and (not isinstance(model, str) or len(model) > MAX_MODEL):
        raise HttpError('LMD-512', param='model', reason=f'it must be a text of at most {MAX_MODEL} characters')
    return Asked(model or None, body.get('stream') is True, _affinity(body, caller))


def _affinity(body: dict[str, Any], caller: str) -> bytes:
    beginning = _beginning(body)
    if not beginning:
        return b''
    tools = msgspec.json.encode(body.get('tools'), order='sorted')
    parts = (caller.encode(), str(body.get('model')).encode('utf-8', 'replace'), tools,
             beginning.encode('utf-8', 'replace'))
    return hashlib.blake2b(b'\0'.join(hashlib.blake2b(part).digest() for part in parts), digest_size=32).digest()


def _beginning(body: dict[str, Any]) -> str:
    """The first :data:`PREFIX_CHARS` characters of the prompt, at most to the end of the first message of the user: all
    turns of a conversation begin alike then, however short their beginning is."""
    parts: list[str] = [_text(body.get(name)) for name in ('system', 'instructions') if body.get(name)]
    for name in ('messages', 'prompt', 'input', 'text', 'input_ids'):
        given = body.get(name)
        if not given:
            continue
        if not (isinstance(given, list) and all(isinstance(one, dict) for one in given)):
            parts.append(_text(given))
            break
        for message in given:
            parts.append(f'\n{message.get("role")}\n{_text(message.get("content"))}')
            if message.get('role') == 'user' or sum(map(len, parts)) >= PREFIX_CHARS:
                break
        break
    return ''.join(parts)[:PREFIX_CHARS]


def _text(value: Any) -> str:
    """A text, the texts of a message's parts, or anything else as JSON; no more of it than counts."""
    if isinstance(value, str):
        return value[:PREFIX_CHARS]
    if isinstance(value, list):
        found = ''
        for part in value[:PREFIX_CHARS]:
            text = part.get('text') if isinstance(part, dict) else None
            found += text[:PREFIX_CHARS] if isinstance(text, str) else _json(part)
            if len(found) >= PREFIX_CHARS:
                break
        return found
    return _json(value)


def _json(value: Any) -> str:
    return msgspec.json.encode(value, order='sorted').decode()[:PREFIX_CHARS] + ','
