"""Scheduler: which tokens run next, in which blocks, and what a finished step means.

One rule: computed tokens catch up with known tokens. There is no prefill phase; a step mixes prompt chunks and decodes
under one token budget, running requests first, then waiting ones. The four rules that keep several launched steps
right:

1. Tokens that the host does not know yet are counted (``pending``), not waited for.
2. :meth:`Scheduler.finish` is the only exit; it returns blocks and slot when no launched step touches the request.
3. Only a request without launched steps is preempted, and nobody is admitted in a turn that preempted.
4. A block is published when its step retires and all its tokens are known; a match leaves at least one token to
   compute; a match that then gets no blocks is undone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

import numpy as np

from lmdeploy.engine.block_pool import BlockPool
from lmdeploy.engine.columns import Columns, Steady, build
from lmdeploy.engine.faults import bad_row, contained
from lmdeploy.engine.groups import Group, Groups
from lmdeploy.engine.intake import longest, receive, refuse
from lmdeploy.engine.invariants import check
from lmdeploy.engine.metrics import Counters
from lmdeploy.engine.outputs import cut_logprobs, take_rows
from lmdeploy.engine.pictures import Pictures
from lmdeploy.engine.plan import NO_MEMORY, NON_FINITE, OK, PENDING, OpenSlot, StepPlan, StepResult
from lmdeploy.engine.request import NEVER, Drafter, EngineInput, Finish, Request, TokenDelta
from lmdeploy.engine.waiting import WaitingQueue
from lmdeploy.errors import EngineDead, LmdeployError
from lmdeploy.executor.base import Capacity
from lmdeploy.log import get_logger

MAX_NON_FINITE = 3  # different prompts, without a finite row between them: the weights or the device are faulty
HEADROOM = 100  # one block in so many stays free for running requests when others are admitted
GATHER = 32  # where slots are short, one in so many is given away at a time,
PATIENCE = 8  # but after so many steps at most

_rank = attrgetter('rank')
Failures = list[tuple[Request, Exception]]  # requests that could not be launched, and why


class Scheduler:
    """A pure state machine: requests and results in, plans and deltas out. Not thread-safe.

    Args:
        capacity: what the device side holds.
        prefix_caching: keep and find the blocks of earlier requests.
        drafter: proposes draft tokens for decoding rows.
        debug: compare token ids on a hit of the prefix index.
    """

    def __init__(self, capacity: Capacity, *, prefix_caching: bool = False, drafter: Drafter | None = None,
                 debug: bool = False) -> None:
        self.capacity = capacity
        self.block_size = capacity.block_size
        self.step_tokens = capacity.max_step_tokens
        self.slots = min(capacity.max_batch_size, capacity.max_step_tokens)
        self.session_len = longest(capacity)
        self.prefix_caching = prefix_caching
        self.drafter = drafter
        self.pool = BlockPool(capacity.num_blocks, debug=debug)
        self.pictures = Pictures(capacity.pictures)
        self.counters = Counters()
        self.running: list[Request] = []  # by rank
        self.waiting = WaitingQueue()
        self.groups = Groups(private=not prefix_caching)
        self.requests: dict[str, Request] = {}  # unfinished
        self.by_slot: list[Request | None] = [None] * self.slots  # finished ones too while steps touch them
        self.flying = 0  # rows launched and not retired
        self._free_slots = list(range(self.slots - 1, -1, -1))
        self._held = 0  # steps since requests wait although a slot is free
        self._closed: list[int] = []  # slots that the runner has not been told to release
        self._out: list[TokenDelta] = []
        self._seq = 1
        self._step = 0
        self._bad_prompts: set[tuple[int, ...]] = set()  # whose logits were not finite, since the last good row

    # -- what comes in -------------------------------------------------------------------------------------------

    def add(self, given: EngineInput) -> None:
        """Accept a request.

        Raises:
            RequestError: LMD-330 to LMD-333, and the request leaves no trace.
        """
        try:
            refuse(given, self.capacity, self.requests)
            request = receive(given, self._seq, self.capacity, prefix_caching=self.prefix_caching,
                              drafts=self.drafter is not None)
        except Exception:
            self.counters.rejected += 1
            raise
        self._seq += 1
        self.requests[request.id] = request
        self.counters.accepted += 1
        self.counters.prompt_tokens += request.prompt_len
        if given.share is not None and not request.all_rows and request.prompt_len > self.block_size:
            group = request.group = self.groups.get(given.share)
            if group.root is not None:
                request.root, request.publish_limit = group.root, request.prompt_len // self.block_size
            if group.join(request):
                return
        self.waiting.push(request)

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown and finished ids are ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            self.finish(request, Finish('abort'))

    def fail_all(self, error: LmdeployError | None) -> None:
        """The engine cannot go on: no launched step will retire. Every request ends, with ``error`` or as aborted."""
        for request in [*self.requests.values(), *(r for r in self.by_slot if r is not None)]:
            request.in_flight = request.pending = 0
            if request.finish is None:
                self.finish(request, Finish('error', error=error) if error is not None else Finish('abort'))
            elif request.slot >= 0:
                self._leave(request)
        self.flying = 0

    # -- what runs next ------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step; without rows if there is nothing to launch before a launched step retires."""
        steady, decode, prefill = Steady(), Columns(), Columns()
        opened: list[OpenSlot] = []
        failed: Failures = []
        if self.capacity.pictures is not None:
            self.pictures.begin(texts=any(request.computed >= request.prompt_len for request in self.running))
        spare, settled = self._plan_running(steady, decode, prefill, failed)
        if settled and not self._gathers():
            self._admit(prefill, opened, spare, failed)
        rows = len(steady.slots) + len(decode.slots) + len(prefill.slots)
        closed, self._closed = tuple(self._closed), []
        if failed:
            opened = self._fail_unlaunched(failed, opened)
        encode, forget = self.pictures.take(bool(rows or opened))
        if rows or opened or encode:
            self._step += 1
            self.flying += rows
            self.counters.steps += 1
        else:
            closed, self._closed = (), [*closed, *self._closed]
            if self._unblock():
                return self.plan()
        plan = build(self._step, steady, decode, prefill, tuple(opened), closed, encode, forget)
        self.counters.computed_tokens += plan.num_tokens
        return plan

    def _fail_unlaunched(self, failed: Failures, opened: list[OpenSlot]) -> list[OpenSlot]:
        """End requests that could not be launched. The runner never hears of slots opened for them in this turn."""
        unheard = {request.slot for request, _ in failed}.intersection(slot.slot for slot in opened)
        for request, cause in failed:
            self._fail(request, cause)
        for slot in unheard:
            self._closed.remove(slot)
        return [slot for slot in opened if slot.slot not in unheard]

    def _plan_running(self, steady: Steady, decode: Columns, prefill: Columns, failed: Failures) -> tuple[int, bool]:
        """Rows for running requests, by rank: each may have one token of the budget, long ones share the rest.

        Returns the rest of the budget, and whether everybody got the blocks for it.
        """
        running, block_size, pool = self.running, self.block_size, self.pool
        spare = self.step_tokens - len(running)
        at, end, settled = 0, len(running), True
        while at < end:
            request = running[at]
            at += 1
            start, pending = request.computed, request.pending
            total = len(request.tokens) + pending
            todo = total - start
            if (todo == 1 and request.plain and total < request.limit and start < len(request.blocks) * block_size
                    and start >= request.images_end):
                # what _launch does, for the usual row
                steady.slots.append(request.slot)
                steady.starts.append(start)
                steady.tokens.append(PENDING if pending else request.tokens[-1])
                request.computed = total
                request.pending = pending + 1
                request.in_flight += 1
                continue
            if not todo or (total >= request.limit and start >= request.prompt_len) or (request.serial and pending):
                continue
            drafts: list[int] = []
            if todo > 1:
                todo = min(todo, 1 + spare)
            elif self.drafter is not None and spare > 0:
                drafts = self._propose(request, spare)
            if start < request.images_end:
                todo = self.pictures.reach(request, start + todo) - start
                if not todo:
                    continue
            stop = start + todo + len(drafts)
            new = -(-stop // block_size) - len(request.blocks)
            if new > 0:
                if new > pool.available:
                    settled = False
                    enough = self._make_room(new, at)
                    end = min(end, len(running))
                    if not enough:
                        # the latest request has launched steps: it sits this turn out and can be preempted the next
                        if end > at:
                            end -= 1
                        continue
                request.blocks += pool.allocate(new)
            if self._launch(decode if todo == total - start == 1 else prefill, request, todo, drafts, failed):
                spare -= todo + len(drafts) - 1
        return spare, settled

    def _make_room(self, blocks: int, after: int) -> bool:
        """Preempt requests from ``running[after]`` on, the latest first, until ``blocks`` are available."""
        running = self.running
        at = len(running) - 1
        while blocks > self.pool.available:
            while at >= after and running[at].in_flight:
                at -= 1
            if at < after:
                return False
            self._preempt(running[at])
            at -= 1
        return True

    def _preempt(self, request: Request) -> None:
        """Take slot and blocks from a request; it comes back with all its tokens known and computes them anew."""
        self.running.remove(request)
        self._leave(request)
        request.preempted = True
        self.waiting.push(request)
        self.counters.preemptions += 1

    def _unblock(self) -> bool:
        """If nothing can be launched and nothing is, running requests wait for each other's pictures and blocks: the
        latest gives way."""
        if self.flying or len(self.running) < 2 or self.capacity.pictures is None:
            return False
        self._preempt(self.running[-1])
        return True

    def _gathers(self) -> bool:
        """Whether requests that queue for slots wait for more of them: steps with prompts cost more to launch."""
        short = 0 < len(self._free_slots) < min(self.slots // GATHER, len(self.waiting))
        self._held = self._held + 1 if short and self._held < PATIENCE else 0
        return self._held > 0

    def _admit(self, prefill: Columns, opened: list[OpenSlot], spare: int, failed: Failures) -> None:
        """Slots for waiting requests, as long as budget, slots and blocks for their known tokens last."""
        headroom = self.capacity.num_blocks // HEADROOM if self.running else 0
        while spare > 0 and self._free_slots:
            request = self.waiting.head()
            if request is None:
                return
            matched = self._match(request)
            start = len(matched) * self.block_size
            known = len(request.tokens)
            todo = min(known - start, spare)
            if (-(-known // self.block_size) - len(matched) + headroom > self.pool.available
                    or not self.pictures.admits(request, start, start + todo)):
                self.pool.release(matched)
                return
            self.waiting.admit(request)
            self._enter(request, matched, opened)
            if request.images:
                todo = self.pictures.reach(request, start + todo) - start
            request.blocks += self.pool.allocate(-(-(start + todo) // self.block_size) - len(matched))
            if todo and self._launch(prefill, request, todo, [], failed):
                spare -= todo
            headroom = self.capacity.num_blocks // HEADROOM

    def _match(self, request: Request) -> list[int]:
        """Take the indexed blocks that begin the request's tokens, all but the last token at most."""
        if request.root is None or request.all_rows:
            return []
        most = min((len(request.tokens) - 1) // self.block_size, request.publish_limit)
        request.extend_hashes(most, self.block_size)
        return self.pool.match(request.hashes[:most], request.tokens, self.block_size)

    def _enter(self, request: Request, matched: list[int], opened: list[OpenSlot]) -> None:
        """Waiting to running."""
        slot = request.slot = self._free_slots.pop()
        self.by_slot[slot] = request
        insort(self.running, request, key=_rank)
        request.blocks = matched
        request.computed = request.settled = len(matched) * self.block_size
        request.published = len(matched)
        request.publish_at = self._publish_at(request)
        self._wake_group(request)
        self.pictures.enter(request)
        opened.append(OpenSlot(slot, request.params, np.array(request.tokens, np.int32), request.prompt_len,
                               tuple((span.start, *span.layout.grid) for span in request.images)))
        if self.prefix_caching and not request.preempted:
            request.cached_tokens = request.computed
            self.counters.prefix_query_tokens += request.prompt_len
            self.counters.prefix_hit_tokens += request.computed

    def _launch(self, rows: Columns, request: Request, count: int, drafts: list[int], failed: Failures) -> bool:
        """A row of ``count`` tokens that exist, and drafts. False if it fails."""
        stop, total = request.computed + count, request.total
        sample = stop == total and total < request.limit
        if sample and request.grammar is not None:
            mask = np.zeros(-(-self.capacity.vocab_size // 32), np.uint32)
            try:
                request.grammar.fill(mask)
            except Exception as cause:  # the request's own code: that request fails, and no other
                failed.append((request, cause))
                return False
            rows.masks.append((len(rows.slots), mask))
        rows.append(request, stop, drafts, request.blocks[request.told:], sample)
        request.told = len(request.blocks)
        request.computed = stop + len(drafts)
        if request.held:
            self.pictures.passed(request)
        request.in_flight += 1
        if sample:
            request.pending += 1 + len(drafts)
        return True

    def _propose(self, request: Request, spare: int) -> list[int]:
        """Draft tokens, as far as budget, blocks and the request's limit allow (the last draw needs no draft)."""
        if request.grammar is not None or request.params.needs_host:
            return []
        room = (len(request.blocks) + self.pool.available) * self.block_size - request.computed - 1
        most = min(spare, room, request.limit - request.total - 1)
        assert self.drafter is not None
        return self.drafter.propose(request, most)[:most] if most > 0 else []

    # -- what a step gave ----------------------------------------------------------------------------------------

    def retire(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in the oldest launched step; returns all deltas since the last call of :meth:`take`.

        Raises:
            EngineDead: LMD-340, when prompt after prompt gives logits that are not finite.
        """
        ends = plan.starts + np.diff(plan.query_start)
        tokens, bounds = result.tokens.tolist(), result.token_start.tolist()
        by_slot, out, usual = self.by_slot, self._out, 0
        self.flying -= plan.rows
        for row, (slot, end, drawn, status, first, last) in enumerate(zip(
                plan.slots.tolist(), ends.tolist(), (plan.sample * (1 + plan.drafts)).tolist(),
                result.status.tolist(), bounds, bounds[1:])):
            request = by_slot[slot]
            assert request is not None
            request.in_flight -= 1
            request.pending -= drawn
            if request.finish is not None or status:
                self._retire_odd(request, status, result.errors.get(row, ''))
                continue
            known = request.tokens
            if (last - first == drawn == 1 and request.usual and tokens[first] not in request.stop_ids
                    and len(known) + 1 < request.limit and end < request.publish_at):
                # what _accept does, for the usual row
                token = tokens[first]
                known.append(token)
                request.settled = end
                usual += 1
                out.append(TokenDelta(request.id, [token], None, None, None, None, request.cached_tokens,
                                      request.prompt_len))
                continue
            try:
                length = int(plan.query_start[row + 1] - plan.query_start[row])
                self._accept(request, row, end - length, length, drawn, tokens[first:last], result)
            except Exception as cause:  # one request's bookkeeping never stops the others'
                self._fail(request, cause)
        self.counters.output_tokens += usual
        if result.lost:
            self._lose_pictures(plan, result.lost)
        if self._bad_prompts:
            self._watch_device(bool((plan.sample & (result.status == OK)).any()))
        return self.take()

    def take(self) -> list[TokenDelta]:
        """All deltas since the last call."""
        out, self._out = self._out, []
        return out

    def _accept(self, request: Request, row: int, start: int, length: int, drawn: int, drew: list[int],
                result: StepResult) -> None:
        """One good row: new tokens, outputs, published blocks, and perhaps the end of the request."""
        rejected = drawn - len(drew)
        if rejected:
            assert 0 < rejected and not request.in_flight, 'a row accepted an impossible number of tokens'
            request.computed -= rejected
        tokens, finish = request.tokens, None
        before = len(tokens)
        for token in drew:
            if token in request.stop_ids:
                finish = Finish('stop', stop_id=token)
                break
            tokens.append(token)
            if request.grammar is not None:
                request.grammar.accept(token)
        new = tokens[before:]
        self.counters.output_tokens += len(new)
        request.settled = min(start + length - rejected, len(tokens))
        if finish is None and len(tokens) >= request.limit and request.settled >= request.prompt_len:
            finish = Finish('length')
        if request.settled >= request.publish_at:
            self._publish(request)
        delta = TokenDelta(request.id, new, None, None, None, None, request.cached_tokens, request.prompt_len)
        if request.outputs:
            delta.logprobs = cut_logprobs(result.logprobs.get(row), len(new))
            rows = take_rows(request, start, drawn, len(new))
            delta.logits = rows(result.logits.get(row), request.params.output_logits)
            delta.hidden = rows(result.hidden.get(row), request.params.output_hidden)
        if finish is not None:
            self.finish(request, finish, delta)
        elif new or delta.logits is not None or delta.hidden is not None:
            self._out.append(delta)

    def _publish(self, request: Request) -> None:
        """Offer the full blocks that retired steps have written to the prefix index."""
        size = self.block_size
        full = min(request.settled // size, request.publish_limit)
        request.extend_hashes(full, size)
        group = request.group
        for i in range(request.published, full):
            tokens = request.tokens[i * size:(i + 1) * size] if self.pool.debug else ()
            if self.pool.publish(request.blocks[i], request.hashes[i], tokens) and group is not None:
                group.keys.add(request.hashes[i])
        request.published = full
        request.publish_at = self._publish_at(request)
        self._wake_group(request)

    def _wake_group(self, request: Request) -> None:
        """Let the members of its group go on if the blocks that they can share are in the index."""
        group = request.group
        shareable = (request.prompt_len - 1) // self.block_size
        if group is not None and group.leader is request and request.published >= shareable:
            for member in group.wake():
                self.waiting.push(member)

    def _publish_at(self, request: Request) -> int:
        if request.root is None or request.published >= request.publish_limit:
            return NEVER
        return (request.published + 1) * self.block_size

    def _retire_odd(self, request: Request, status: int, cause: str) -> None:
        """A row whose request ended meanwhile, or whose status is bad."""
        if status == NON_FINITE:
            # what it computed, or computed from, may be poisoned: nobody shall find it any more
            for block in request.blocks:
                self.pool.withdraw(block)
            request.publish_at = NEVER
        if request.finish is None:
            if status == NON_FINITE:
                self.counters.non_finite += 1
                if not request.params.needs_host:  # whose own code may have made them so
                    self._bad_prompts.add(tuple(request.tokens[:request.prompt_len]))
            self.finish(request, Finish('error', error=bad_row(status, len(request.tokens), cause)))
        elif not request.in_flight:
            self._leave(request)

    def _lose_pictures(self, plan: StepPlan, cause: str) -> None:
        """A step had no memory to encode its pictures: whoever waits for them fails."""
        self.pictures.lose(encode.picture for encode in plan.encode)
        for request in [request for request in self.running if self.pictures.has_lost(request)]:
            self.finish(request, Finish('error', error=bad_row(NO_MEMORY, len(request.tokens), cause)))

    def _watch_device(self, good: bool) -> None:
        """Logits that are not finite for prompt after prompt, and no good row between, are not the prompts' fault."""
        if good:
            self._bad_prompts.clear()
        elif len(self._bad_prompts) >= MAX_NON_FINITE:
            raise EngineDead('LMD-340', count=len(self._bad_prompts))

    # -- how a request ends --------------------------------------------------------------------------------------

    def _fail(self, request: Request, cause: Exception) -> None:
        get_logger().error('request %s failed', request.id, exc_info=cause)
        self.finish(request, Finish('error', error=contained(cause)))

    def finish(self, request: Request, finish: Finish, delta: TokenDelta | None = None) -> None:
        """The only exit: tell the end, wake who waited for this request, return what it holds once nothing uses it."""
        assert request.finish is None, f'request {request.id} finishes twice'
        request.finish = finish
        del self.requests[request.id]
        self.counters.end(finish.reason)
        if delta is None:
            delta = TokenDelta(request.id, [], cached_tokens=request.cached_tokens, prompt_len=request.prompt_len)
        delta.finish = finish
        self._out.append(delta)
        group = request.group
        parked = group is not None and request in group.parked
        if request.slot >= 0:
            del self.running[bisect_left(self.running, request.rank, key=_rank)]
        elif not parked:
            self.waiting.remove(request)
        if group is not None:
            self._leave_group(request, group)
        if request.slot >= 0 and not request.in_flight:
            self._leave(request)

    def _leave_group(self, request: Request, group: Group) -> None:
        for member in group.leave(request):
            self.waiting.push(member)
        if not group.members:
            self.groups.drop(group)
            if group.root is not None:
                self.pool.forget(group.keys)

    def _leave(self, request: Request) -> None:
        """Give back slot and blocks; no launched step touches them."""
        self.pool.release(request.blocks)
        self.by_slot[request.slot] = None
        if request.images:
            self.pictures.leave(request)
        self._free_slots.append(request.slot)
        self._closed.append(request.slot)
        request.blocks, request.slot = [], -1
        request.computed = request.settled = request.published = 0
        request.told = 0
        request.publish_at = NEVER

    # -- what must always hold -----------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether there is no request and no launched step."""
        return not self.requests and not self.flying

    def parked(self) -> list[Request]:
        """Requests that wait for their group's leader."""
        return [request for group in self.groups for request in group.parked]

    def check(self) -> None:
        """Assert the invariants."""
        check(self)
