"""What must hold between any two calls of the scheduler, by number."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdeploy.engine.request import Request
    from lmdeploy.engine.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Assert them all; ``O(blocks + tokens)``, for tests and for finding faults.

    1. The invariants of the pool and of the pictures, with all requests that hold a slot.
    2. Every unfinished request is in exactly one of running, waiting and parked; running is sorted by rank.
    3. A slot is free or belongs to one request; running requests and those that ended in flight hold one.
    4. The request's own invariants (:class:`lmdeploy.engine.request.Request`).
    5. A table has no block twice; two tables share a block only where both have published the same content.
    6. A published block holds what its key says, or another block does.
    7. Rows in flight are the requests' in-flight counts together.
    8. accepted = finished + failed + cancelled + unfinished.
    9. Idle: no block is used, every slot is free, no group is left; without prefix cache nothing is indexed.
    """
    held = [request for request in scheduler.by_slot if request is not None]
    scheduler.pool.check(request.blocks for request in held)
    scheduler.pictures.check(held)
    _places(scheduler, held)
    for request in [*scheduler.requests.values(), *held]:
        _request(scheduler, request)
    _sharing(scheduler, held)
    assert scheduler.flying == sum(request.in_flight for request in held), '7: rows in flight are miscounted'
    count = scheduler.counters
    ended = count.finished + count.failed + count.cancelled
    assert count.accepted == ended + len(scheduler.requests), '8: a request was lost or counted twice'
    if scheduler.idle:
        assert scheduler.pool.used == 0, '9: blocks leak'
        assert not held, '9: slots leak'
        assert len(scheduler.groups) == 0, '9: groups leak'
        assert scheduler.prefix_caching or not len(scheduler.pool), '9: blocks stay in the index'


def _places(scheduler: Scheduler, held: list[Request]) -> None:
    places = [*scheduler.running, *scheduler.waiting, *scheduler.parked()]
    known = Counter(map(id, scheduler.requests.values()))
    assert Counter(map(id, places)) == known, '2: a request is lost or in two places'
    assert len(scheduler.waiting) == sum(1 for _ in scheduler.waiting), '2: the waiting queue is miscounted'
    ranks = [request.rank for request in scheduler.running]
    assert ranks == sorted(ranks), '2: running requests are out of order'
    slots = [*scheduler._free_slots, *(request.slot for request in held)]
    assert sorted(slots) == list(range(scheduler.slots)), '3: a slot leaks or is held twice'
    assert all(scheduler.by_slot[request.slot] is request for request in held), '3: a slot has two owners'
    ended = [request for request in held if request.finish is not None]
    assert {id(r) for r in held} == {id(r) for r in [*scheduler.running, *ended]}, '3: who holds a slot is not running'
    assert all(request.in_flight for request in ended), '3: an ended request keeps its slot for nothing'


def _request(scheduler: Scheduler, request: Request) -> None:
    size, known = scheduler.block_size, len(request.tokens)
    if request.slot < 0:
        assert not (request.blocks or request.computed or request.in_flight or request.pending or request.published
                    or request.held), '4.4: a request without a slot holds something'
        return
    if request.finish is None:
        assert request.settled < request.publish_at, '4.5: a block that could be published is not'
        assert request.settled <= request.computed <= request.total, '4.1: positions disagree'
        assert request.settled <= known, '4.1: unknown tokens are settled'
        assert known <= request.limit, '4.1: more tokens than its limit'
        assert request.computed <= max(request.prompt_len, request.limit - 1), '4.1: computed beyond what it can say'
    assert request.pending >= 0 and request.in_flight >= 0, '4.2: a count is negative'
    assert request.in_flight or not request.pending, '4.2: tokens are pending without a launched step'
    if scheduler.drafter is None:
        assert request.pending <= request.in_flight, '4.2: more tokens pending than launched'
    assert len(request.blocks) * size >= request.computed, '4.3: tokens without a block'
    assert request.published * size <= request.settled or request.finish is not None, '4.5: published before computed'


def _sharing(scheduler: Scheduler, held: list[Request]) -> None:
    size = scheduler.block_size
    owners: dict[int, tuple[int, bytes | None]] = {}
    for request in held:
        assert len(set(request.blocks)) == len(request.blocks), '5: a table has a block twice'
        for i, block in enumerate(request.blocks):
            key = request.hashes[i] if i < request.published else None
            if block in owners:
                assert key is not None and owners[block] == (i, key), '5: two tables share a block by mistake'
            owners[block] = (i, key)
            indexed = scheduler.pool.key(block)
            if indexed is not None:
                assert i < request.published and indexed == key, '6: an unpublished block is in the index'
                assert (i + 1) * size <= request.settled, '6: a block is in the index before it is computed'
