"""EngineCore: the loop that turns requests into launched steps and results into deltas.

Other threads only :meth:`~EngineCore.submit` and :meth:`~EngineCore.abort`; one thread calls
:meth:`~EngineCore.step`. With ``depth = 1`` a step is launched and awaited; with ``depth = 2`` the next step is
launched before the last one's result is known.
"""

from __future__ import annotations

from collections import deque

from lmdeploy.engine.faults import contained, fatal
from lmdeploy.engine.metrics import EngineStats
from lmdeploy.engine.plan import StepPlan
from lmdeploy.engine.pooled import PooledScheduler
from lmdeploy.engine.request import Drafter, EngineInput, Finish, TokenDelta
from lmdeploy.engine.scheduler import Scheduler
from lmdeploy.errors import EngineDead, LmdeployError
from lmdeploy.executor.base import Capacity, Executor, StepHandle
from lmdeploy.log import get_logger


class EngineCore:
    """Mailbox, scheduler and launched steps.

    Args:
        executor: runs plans; started.
        capacity: what starting it returned.
        depth: launched, unretired steps at most.
        prefix_caching: keep and find the blocks of earlier requests.
        drafter: proposes draft tokens for decoding rows.
        debug: compare token ids on a hit of the prefix index.
    """

    def __init__(self, executor: Executor, capacity: Capacity, *, depth: int = 1, prefix_caching: bool = False,
                 drafter: Drafter | None = None, debug: bool = False) -> None:
        self.executor = executor
        self.scheduler: Scheduler | PooledScheduler
        if capacity.pooling is not None:
            self.scheduler = PooledScheduler(capacity)
        else:
            self.scheduler = Scheduler(capacity, prefix_caching=prefix_caching, drafter=drafter, debug=debug)
        self.depth = depth
        self.launched: deque[tuple[StepPlan, StepHandle]] = deque()
        self.dead: LmdeployError | None = None  # why no request is served any more
        self._mailbox: deque[EngineInput | str] = deque()  # requests, and ids to abort

    def submit(self, request: EngineInput) -> None:
        """Hand in a request; a refusal comes as its first and last delta. Thread-safe."""
        self._mailbox.append(request)

    def abort(self, request_id: str) -> None:
        """End a request; ids that are unknown or ended are ignored. Thread-safe."""
        self._mailbox.append(request_id)

    @property
    def idle(self) -> bool:
        """Whether :meth:`step` has nothing to do."""
        return not self._mailbox and not self.launched and self.scheduler.idle

    def step(self) -> list[TokenDelta]:
        """One turn: take in what arrived, launch a step, retire the oldest if there are ``depth`` or nothing to launch.

        An executor that raises is the end of the engine: every request gets its :class:`EngineDead`.
        """
        refused = self._read_mailbox()
        if self.dead is None:
            try:
                return refused + self._turn()
            except Exception as cause:  # whatever it was: the device's state is unknown now
                self.die(cause)
        return refused + self.scheduler.take()

    def _turn(self) -> list[TokenDelta]:
        plan = self.scheduler.plan()
        if plan.work:
            self.launched.append((plan, self.executor.launch(plan)))
        if self.launched and (not plan.work or len(self.launched) >= self.depth):
            plan, handle = self.launched.popleft()
            deltas = self.scheduler.retire(plan, handle.result())
        else:
            deltas = self.scheduler.take()
        if self.scheduler.idle and self.scheduler.pool.used:
            get_logger().error('%d KV blocks are in use although there is no request', self.scheduler.pool.used)
        return deltas

    def _read_mailbox(self) -> list[TokenDelta]:
        refused = []
        while self._mailbox:
            mail = self._mailbox.popleft()
            if isinstance(mail, str):
                self.scheduler.abort(mail)
                continue
            try:
                if self.dead is not None:
                    raise self.dead
                self.scheduler.add(mail)
            except Exception as cause:  # an input of impossible kind is that request's failure, and no other's
                error = cause if isinstance(cause, LmdeployError) else contained(cause)
                refused.append(TokenDelta(mail.id, [], Finish('error', error=error)))
        return refused

    def die(self, cause: BaseException) -> None:
        """Serve nothing any more: every request, now or later, fails with ``cause``."""
        if self.dead is None:
            get_logger().critical('the engine stops', exc_info=cause)
            self.dead = fatal(cause)
        self.launched.clear()
        self.scheduler.fail_all(self.dead)

    def close(self) -> list[TokenDelta]:
        """Abort everything; the launched steps are forgotten. Returns the last deltas."""
        if self.dead is None:
            self.dead = EngineDead('LMD-339')
        refused = self._read_mailbox()
        self.launched.clear()
        self.scheduler.fail_all(None)
        return refused + self.scheduler.take()

    def check(self) -> None:
        """Assert every invariant of the bookkeeping (see :mod:`lmdeploy.engine.invariants`)."""
        self.scheduler.check()
        assert len(self.launched) <= self.depth
        assert self.scheduler.flying == sum(plan.rows for plan, _ in self.launched), '7: a launched step is lost'

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment; call between steps."""
        scheduler = self.scheduler
        pool, count = scheduler.pool, scheduler.counters
        running = len(scheduler.running)
        return EngineStats(
            waiting=len(scheduler.requests) - running, running=running, total_blocks=pool.num_blocks,
            used_blocks=pool.used, cached_blocks=pool.cached, accepted=count.accepted, rejected=count.rejected,
            finished=count.finished, failed=count.failed, cancelled=count.cancelled, in_flight=len(scheduler.requests),
            steps=count.steps, prompt_tokens=count.prompt_tokens, output_tokens=count.output_tokens,
            computed_tokens=count.computed_tokens, prefix_query_tokens=count.prefix_query_tokens,
            prefix_hit_tokens=count.prefix_hit_tokens, preemptions=count.preemptions, non_finite=count.non_finite)
