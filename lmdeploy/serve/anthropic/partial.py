"""The object that a JSON text which broke off has begun."""

from __future__ import annotations

import json
from typing import Any

CLOSERS = {'{': '}', '[': ']'}


def partial_object(text: str) -> dict[str, Any]:
    """What ``text`` says as far as it goes: the members that are certain to be complete.

    A call's arguments that reach ``max_tokens`` end anywhere, but a message has them as an object. The last member is
    left out unless something follows it; text that is no object at all is an empty one.
    """
    stack: list[str] = []
    cut, closers = 0, ''
    in_text = escaped = False
    for pos, char in enumerate(text):
        if in_text:
            in_text = escaped or char != '"'
            escaped = not escaped and char == '\\'
        elif char == '"':
            in_text = True
        elif char in CLOSERS:
            stack.append(CLOSERS[char])
            cut, closers = pos + 1, ''.join(reversed(stack))
        elif char in '}]':
            if not stack or stack.pop() != char:
                break
            cut, closers = pos + 1, ''.join(reversed(stack))
            if not stack:
                break
        elif char == ',' and stack:
            cut, closers = pos, ''.join(reversed(stack))
    try:
        value = json.loads(text[:cut] + closers)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
