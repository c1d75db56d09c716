"""PooledScheduler: the scheduler of an encoder, whose requests are whole texts that become one vector each.

A text is read in one step, and needs nothing that outlives the step: no blocks, no chunks, no preemption. What is left
of scheduling is who goes first (:class:`~lmdeploy.engine.waiting.WaitingQueue`) and how many texts fit into a step.

Life of a request: added -> waiting -> running (in the one step that it has) -> finished.

Invariants (:meth:`PooledScheduler.check`):
    1. a running request has a slot of its own and one launched step; a waiting one has neither;
    2. a slot is taken until the step that it stands in retires, finished or not;
    3. accepted requests are finished, failed, cancelled, waiting or running.
"""

from __future__ import annotations

import numpy as np

from lmdeploy.engine.block_pool import BlockPool
from lmdeploy.engine.faults import bad_row
from lmdeploy.engine.metrics import Counters
from lmdeploy.engine.plan import NON_FINITE, OK, OUTPUT_LAST, OpenSlot, StepPlan, StepResult
from lmdeploy.engine.request import EngineInput, Finish, Request, TokenDelta
from lmdeploy.engine.waiting import WaitingQueue
from lmdeploy.errors import LmdeployError, RequestError
from lmdeploy.executor.base import Capacity


class PooledScheduler:
    """A pure state machine with the face of :class:`~lmdeploy.engine.scheduler.Scheduler`. Not thread-safe.

    Args:
        capacity: what the device side holds.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.pool = BlockPool(0)
        self.counters = Counters()
        self.waiting = WaitingQueue(quantum=capacity.max_step_tokens)
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}  # unfinished
        self.by_slot: list[Request | None] = [None] * capacity.max_batch_size
        self.flying = 0  # rows launched and not retired
        self._out: list[TokenDelta] = []
        self._seq = self._step = 0

    def add(self, given: EngineInput) -> None:
        """Accept a request.

        Raises:
            RequestError: LMD-308 (it wants tokens), LMD-309 (length), LMD-331 (token id), LMD-333 (id).
        """
        try:
            self._refuse(given)
        except RequestError:
            self.counters.rejected += 1
            raise
        self._seq += 1
        length = len(given.tokens)
        request = Request(id=given.id, seq=self._seq, tokens=list(given.tokens), prompt_len=length,
                          params=given.params, limit=length, tenant=given.tenant, priority=given.priority)
        self.requests[request.id] = request
        self.counters.accepted += 1
        self.counters.prompt_tokens += length
        self.waiting.push(request)

    def _refuse(self, given: EngineInput) -> None:
        capacity, length = self.capacity, len(given.tokens)
        if given.id in self.requests:
            raise RequestError('LMD-333', id=given.id)
        if given.params.max_new_tokens:
            raise RequestError('LMD-308')
        if not 1 <= length <= capacity.session_len:
            raise RequestError('LMD-309', prompt_len=length, session_len=capacity.session_len,
                               model_len=capacity.session_len)
        for token in given.tokens:
            if not 0 <= token < capacity.vocab_size:
                raise RequestError('LMD-331', token=token, vocab_size=capacity.vocab_size)

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown and finished ids are ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, Finish('abort'))

    def fail_all(self, error: LmdeployError | None) -> None:
        """The engine cannot go on: no launched step will retire. Every request ends, with ``error`` or as aborted."""
        for request in list(self.requests.values()):
            self._finish(request, Finish('abort') if error is None else Finish('error', error=error))
        self.by_slot = [None] * len(self.by_slot)
        self.flying = 0

    def plan(self) -> StepPlan:
        """The next step; without rows if there is nothing to launch before a launched step retires."""
        rows: list[Request] = []
        tokens: list[int] = []
        lengths = [0]
        while (head := self.waiting.head()) is not None and None in self.by_slot:
            if rows and len(tokens) + head.prompt_len > self.capacity.max_step_tokens:
                break
            self.waiting.admit(head)
            head.slot, head.in_flight = self.by_slot.index(None), 1
            self.by_slot[head.slot] = head
            self.running.append(head)
            rows.append(head)
            tokens += head.tokens
            lengths.append(head.prompt_len)
        count = len(rows)
        if count:
            self._step += 1
            self.flying += count
            self.counters.steps += 1
            self.counters.computed_tokens += len(tokens)
        return StepPlan(
            step=self._step,
            slots=np.array([request.slot for request in rows], np.int32),
            starts=np.zeros(count, np.int32),
            query_start=np.cumsum(lengths, dtype=np.int32),
            tokens=np.array(tokens, np.int32),
            block_start=np.zeros(count + 1, np.int32),
            blocks=np.zeros(0, np.int32),
            outputs=np.full(count, OUTPUT_LAST, np.uint8),
            sample=np.zeros(count, np.bool_),
            drafts=np.zeros(count, np.int32),
            opened=tuple(OpenSlot(request.slot, request.params, np.array(request.tokens, np.int32),
                                  request.prompt_len) for request in rows),
            closed=(),
        )

    def retire(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in the oldest launched step; returns all deltas since the last call of :meth:`take`."""
        self.flying -= plan.rows
        for row, slot in enumerate(plan.slots.tolist()):
            request = self.by_slot[slot]
            assert request is not None
            self.by_slot[slot] = None
            request.in_flight = 0
            if request.finish is not None:
                continue
            status, vector = int(result.status[row]), result.hidden.get(row)
            if status == OK and not np.isfinite(np.asarray(vector)).all():
                status = NON_FINITE
                self.counters.non_finite += 1
            if status == OK:
                self._finish(request, Finish('stop'), vector)
            else:
                error = bad_row(status, request.prompt_len, result.errors.get(row, ''))
                self._finish(request, Finish('error', error=error))
        return self.take()

    def take(self) -> list[TokenDelta]:
        """The deltas since the last call."""
        out, self._out = self._out, []
        return out

    def _finish(self, request: Request, finish: Finish, vector: object = None) -> None:
        """The only exit."""
        assert request.finish is None, f'request {request.id} finishes twice'
        request.finish = finish
        del self.requests[request.id]
        self.counters.end(finish.reason)
        if request.slot >= 0:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._out.append(TokenDelta(request.id, [], finish, hidden=vector, prompt_len=request.prompt_len))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to plan, nothing launched and nothing to tell."""
        return not self.requests and not self.flying and not self._out

    def check(self) -> None:
        """Assert the invariants of the module's list, by their numbers."""
        taken = [request for request in self.by_slot if request is not None]
        for request in self.running:
            assert self.by_slot[request.slot] is request and request.in_flight == 1, '1: running without its slot'
        assert all(request.slot < 0 and not request.in_flight for request in self.waiting), '1: waiting with a slot'
        assert len(taken) == self.flying, '2: a slot is free although its step flies, or taken without one'
        count = self.counters
        assert len(self.requests) == len(self.running) + len(self.waiting), '3: a request is lost'
        assert count.accepted == count.finished + count.failed + count.cancelled + len(self.requests), '3: the sum'
