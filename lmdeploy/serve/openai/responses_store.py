"""The answers that the server remembers, so that a request can go on from one: in memory, bounded, apart by key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmdeploy.serve.limits import Limits


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer with all that was said until its end.

    Attributes:
        body: the response, as it was sent.
        messages: the conversation without instructions, with the answer.
        size: bytes that it counts for.
    """

    id: str
    body: bytes
    messages: tuple[dict[str, Any], ...]
    size: int


@dataclass(slots=True)
class _Shelf:
    """What one caller has stored, the least recently used first."""

    entries: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    size: int = 0


class ResponseStore:
    """Answers by caller and id. What is too much for a caller is forgotten, the least recently used first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._shelves: dict[str, _Shelf] = {}

    def keep(self, caller: str, response_id: str, body: bytes, messages: Sequence[dict[str, Any]]) -> None:
        """Remember an answer, unless it alone is beyond the limit."""
        size = len(body) + len(msgspec.json.encode(messages))
        if size > self._limits.response_bytes:
            return
        shelf = self._shelves.setdefault(caller, _Shelf())
        shelf.entries[response_id] = StoredResponse(response_id, body, tuple(messages), size)
        shelf.size += size
        while len(shelf.entries) > self._limits.responses or shelf.size > self._limits.response_bytes:
            shelf.size -= shelf.entries.popitem(last=False)[1].size

    def get(self, caller: str, response_id: str) -> StoredResponse | None:
        """An answer of this caller; it counts as used."""
        shelf = self._shelves.get(caller)
        if shelf is None or response_id not in shelf.entries:
            return None
        shelf.entries.move_to_end(response_id)
        return shelf.entries[response_id]

    def delete(self, caller: str, response_id: str) -> bool:
        """Forget an answer; whether there was one."""
        shelf = self._shelves.get(caller)
        found = None if shelf is None else shelf.entries.pop(response_id, None)
        if shelf is None or found is None:
            return False
        shelf.size -= found.size
        if not shelf.entries:
            del self._shelves[caller]
        return True
