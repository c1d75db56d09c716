"""Suspects: which requests may have crashed the engine.

A request that was in a step at one crash is a suspect. It is served again, but not beside another suspect, so that a
second crash names one; it is acquitted, and the next one's turn comes, when it is past the point where it was at the
crash. A request with two crashes is refused. Nobody else waits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from lmdeploy.engine.request import EngineInput
from lmdeploy.errors import RequestError

MOST_CRASHES = 2  # of a request
MOST_SUSPECTS = 1024  # the oldest are forgotten


@dataclass(slots=True)
class _Record:
    crashes: int
    generated: int  # tokens, when the engine crashed


class Suspects:
    """Requests that were in a step when the engine crashed, by a digest of what they ask for. Of one event loop."""

    def __init__(self) -> None:
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        self._turn = asyncio.Lock()  # held for the one suspect that is served

    def accuse(self, request: EngineInput, generated: int) -> None:
        """It was in a step when the engine crashed, and had generated so many tokens."""
        key = digest(request)
        old = self._records.pop(key, _Record(0, 0))
        self._records[key] = _Record(old.crashes + 1, max(old.generated, generated))
        while len(self._records) > MOST_SUSPECTS:
            self._records.popitem(last=False)

    async def admit(self, request: EngineInput) -> Trial | None:
        """Wait until ``request`` may be served; None: it is no suspect.

        Raises:
            RequestError: LMD-346, it has crashed the engine twice.
        """
        if not self._records:
            return None
        key = digest(request)
        if key not in self._records:
            return None
        await self._turn.acquire()
        trial = Trial(self, key)
        record = self._records.get(key)  # while it waited it may have crashed again, or been acquitted
        if record is None:
            trial.close()
        elif record.crashes >= MOST_CRASHES:
            trial.close()
            raise RequestError('LMD-346', crashes=record.crashes)
        return trial


class Trial:
    """A suspect that is being served."""

    __slots__ = ('_suspects', '_key', '_open')

    def __init__(self, suspects: Suspects, key: bytes) -> None:
        self._suspects, self._key, self._open = suspects, key, True

    def saw(self, generated: int, *, ended: bool) -> None:
        """It has generated so many tokens, and perhaps ended well: acquit it if that is further than before."""
        record = self._suspects._records.get(self._key)
        if self._open and (record is None or ended or generated > record.generated):
            self._suspects._records.pop(self._key, None)
            self.close()

    def close(self) -> None:
        """The next suspect's turn; safe to call twice."""
        if self._open:
            self._open = False
            self._suspects._turn.release()


def digest(request: EngineInput) -> bytes:
    """Of what a request asks for: everything but its id, its seed, and whose it is."""
    params = request.params
    asked = [getattr(params, name) for name in params.__slots__ if name not in ('seed', 'logits_processors')]
    words = [getattr(processor, 'texts', None) for processor in params.logits_processors]
    grammar = getattr(request.grammar, 'source', None)
    images = [image.digest for image in request.images]
    return hashlib.sha256(repr((request.tokens, asked, words, grammar, images, request.adapter)).encode()).digest()
