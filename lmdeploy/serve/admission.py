"""Admission: who may start now, who waits, and who is turned away with the seconds to wait.

Answers are counted, not requests: ``n=8`` weighs eight. Up to ``most`` run at once (the engine queues what does not fit
into its batch); others wait here, first come, first served, as long as the queue has room.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lmdeploy.serve.auth import Caller
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits

Clock = Callable[[], float]
MINUTE = 60.0
MAX_CALLERS = 4096  # keys whose use is remembered


@dataclass(slots=True)
class Bucket:
    """So many units per minute, and as many at once."""

    per_minute: int
    level: float
    seen: float

    def refill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.seen) * self.per_minute / MINUTE)
        self.seen = now

    def wait(self, units: float) -> float:
        """Seconds until ``units`` are there (0: they are)."""
        missing = min(units, self.per_minute) - self.level
        return max(0.0, missing * MINUTE / self.per_minute)


@dataclass(slots=True)
class _Use:
    """What one caller uses."""

    running: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None


@dataclass(slots=True)
class Admission:
    """The server's gate.

    Args:
        limits: the sizes of queue and per-key allowances.
        most: answers that run at once; 0: as many as come.
        batch: answers that the engine works on at once; beyond, they wait in its queue.
        clock: monotonic seconds.
    """

    limits: Limits
    most: int = 0
    batch: int = 1
    clock: Clock = time.monotonic
    running: int = 0
    queued: int = 0
    _waiters: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)
    _uses: dict[str, _Use] = field(default_factory=dict)
    _seconds: float = 2.0  # smoothed duration of a request

    @property
    def waiting(self) -> int:
        """Answers that wait, here or (as far as is known here) in the engine."""
        return self.queued + max(0, self.running - self.batch)

    @asynccontextmanager
    async def enter(self, caller: Caller, answers: int) -> AsyncIterator[None]:
        """Hold a place while the request runs.

        Raises:
            HttpError: LMD-515, the queue is full; LMD-516, the key's allowance is used up.
        """
        use = self._allow(caller)
        places = min(self.most or self.batch, self.batch)
        taken = self.running + self.queued
        if taken and taken + answers - places > self.limits.queue:  # whoever comes first is never too large
            raise HttpError('LMD-515', waiting=self.waiting, most=self.limits.queue, retry_after=self._retry())
        use.running += 1
        started = self.clock()
        try:
            await self._place(answers)
            try:
                yield
            finally:
                self.running -= answers
                self._seconds += 0.1 * (self.clock() - started - self._seconds)
                self._admit()
        finally:
            use.running -= 1

    def spend(self, caller: Caller, tokens: int) -> None:
        """Count tokens of prompts and answers against the key's allowance; it may go below zero."""
        use = self._uses.get(caller.id)
        if use is not None and use.tokens is not None:
            use.tokens.refill(self.clock())
            use.tokens.level -= tokens

    async def _place(self, answers: int) -> None:
        if not self._waiters and (not self.most or not self.running or self.running + answers <= self.most):
            self.running += answers
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (answers, turn)
        self._waiters.append(entry)
        self.queued += answers
        try:
            await turn  # whoever wakes us has counted us as running
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.running -= answers
                self._admit()
            else:
                self._waiters.remove(entry)
                self.queued -= answers
            raise

    def _admit(self) -> None:
        while self._waiters:
            answers, turn = self._waiters[0]
            if self.most and self.running and self.running + answers > self.most:
                return
            self._waiters.popleft()
            self.queued -= answers
            if not turn.done():
                self.running += answers
                turn.set_result(None)

    def _allow(self, caller: Caller) -> _Use:
        use = self._uses.get(caller.id)
        limits, now = self.limits, self.clock()
        if use is None:
            if len(self._uses) >= MAX_CALLERS:
                self._uses = {name: use for name, use in self._uses.items() if use.running}
            use = self._uses[caller.id] = _Use(
                requests=_bucket(limits.key_requests_per_minute, now),
                tokens=_bucket(limits.key_tokens_per_minute, now))
        if limits.key_requests and use.running >= limits.key_requests:
            raise HttpError('LMD-516', most=limits.key_requests, what='requests at a time', retry_after=self._retry())
        for bucket, what in ((use.tokens, 'tokens per minute'), (use.requests, 'requests per minute')):
            if bucket is not None:
                bucket.refill(now)
                wait = bucket.wait(1)
                if wait:
                    raise HttpError('LMD-516', most=bucket.per_minute, what=what, retry_after=max(1.0, wait))
        if use.requests is not None:
            use.requests.level -= 1
        return use

    def _retry(self) -> float:
        """Seconds until the queue has probably moved on, from 1 to 30."""
        return min(30.0, max(1.0, self._seconds * self.waiting / max(self.batch, 1)))


def _bucket(per_minute: int, now: float) -> Bucket | None:
    return Bucket(per_minute, float(per_minute), now) if per_minute else None
