"""WaitingQueue: which request gets the next free slot.

The highest priority first; within it preempted requests, oldest first, then new ones: first come, first served within a
tenant, deficit round robin between tenants. The head stays the head until it is admitted or removed, so that a large
request is not overtaken for ever by small ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from lmdeploy.engine.request import Request

QUANTUM = 64
"""Prompt tokens that each tenant may bring in a round: so few that a turn is seldom more than one or two requests, as
whoever waits for a turn waits for as many answers to end."""
_seq = attrgetter('seq')


@dataclass(slots=True)
class _Tenant:
    """New requests of one tenant, and how many prompt tokens it may still bring in this round."""

    queue: list[Request] = field(default_factory=list)
    deficit: int = 0


class _Level:
    """The waiting requests of one priority."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self.returning: list[Request] = []
        self.tenants: dict[str, _Tenant] = {}
        self.ring: deque[str] = deque()

    def push(self, request: Request) -> None:
        if request.preempted:
            insort(self.returning, request, key=_seq)
            return
        tenant = self.tenants.get(request.tenant)
        if tenant is None:
            tenant = self.tenants[request.tenant] = _Tenant()
            self.ring.append(request.tenant)
        insort(tenant.queue, request, key=_seq)

    def head(self) -> Request:
        if self.returning:
            return self.returning[0]
        if len(self.ring) == 1:
            return self.tenants[self.ring[0]].queue[0]
        while True:
            tenant = self.tenants[self.ring[0]]
            if tenant.deficit >= len(tenant.queue[0].tokens):
                return tenant.queue[0]
            tenant.deficit += self.quantum
            self.ring.rotate(-1)

    def remove(self, request: Request, *, served: bool) -> None:
        if request.preempted:
            _delete(self.returning, request)
            return
        tenant = self.tenants[request.tenant]
        _delete(tenant.queue, request)
        if served:
            tenant.deficit = max(0, tenant.deficit - len(request.tokens))
        if not tenant.queue:
            del self.tenants[request.tenant]
            self.ring.remove(request.tenant)

    def __bool__(self) -> bool:
        return bool(self.returning or self.ring)

    def __iter__(self) -> Iterator[Request]:
        yield from self.returning
        for tenant in self.tenants.values():
            yield from tenant.queue


class WaitingQueue:
    """Requests that wait for a slot.

    Args:
        quantum: prompt tokens that each tenant may bring in a round.
    """

    def __init__(self, quantum: int = QUANTUM) -> None:
        self._quantum = quantum
        self._levels: dict[int, _Level] = {}
        self._order: list[int] = []  # priorities that wait, ascending
        self._size = 0

    def push(self, request: Request) -> None:
        """Let ``request`` wait at the place of its arrival."""
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = _Level(self._quantum)
            insort(self._order, request.priority)
        level.push(request)
        self._size += 1

    def head(self) -> Request | None:
        """The request that is admitted next; stable until the queue changes."""
        return self._levels[self._order[-1]].head() if self._order else None

    def admit(self, request: Request) -> None:
        """Take the head out: it is admitted."""
        self._remove(request, served=True)

    def remove(self, request: Request) -> None:
        """Take ``request`` out: it ended."""
        self._remove(request, served=False)

    def _remove(self, request: Request, *, served: bool) -> None:
        level = self._levels[request.priority]
        level.remove(request, served=served)
        self._size -= 1
        if not level:
            del self._levels[request.priority]
            self._order.remove(request.priority)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        for priority in reversed(self._order):
            yield from self._levels[priority]


def _delete(queue: list[Request], request: Request) -> None:
    at = bisect_left(queue, request.seq, key=_seq)
    assert queue[at] is request
    del queue[at]
