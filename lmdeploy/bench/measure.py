"""One workload through an engine core, as fast as it goes, and what the clock says.

The core is stepped in the caller's thread: no frontend, no other thread, nothing between the engine and the clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.engine.request import EngineInput
from lmdeploy.executor.base import Executor, StepHandle


@dataclass(slots=True)
class Measured:
    """A run. Times in seconds.

    Attributes:
        seconds: from the first request's arrival to the last token.
        first: time to the first token of each request, from its arrival.
        per_token: for each request with two tokens or more, the mean time between its tokens.
        gaps: the times between a request's deltas, if they were asked for.
        steps: launched; ``waited``: spent waiting for the device, of ``seconds``; the rest is the host's own work.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    first: list[float]
    per_token: list[float]
    steps: int
    waited: float
    preemptions: int
    gaps: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def host_ms(self) -> float:
        """The host's own work per step, in milliseconds."""
        return 1000 * (self.seconds - self.waited) / max(1, self.steps)


class _Waits:
    """An executor whose handles count the time that somebody waits for them."""

    def __init__(self, inner: Executor) -> None:
        self.inner, self.seconds = inner, 0.0

    def launch(self, plan: StepPlan) -> StepHandle:
        return _Handle(self, self.inner.launch(plan))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(slots=True)
class _Handle:
    waits: _Waits
    inner: StepHandle

    def result(self) -> StepResult:
        begin = time.perf_counter()
        result = self.inner.result()
        self.waits.seconds += time.perf_counter() - begin
        return result


def run(core: EngineCore, requests: Iterable[EngineInput], *, concurrency: int | None = None,
        gaps: bool = False) -> Measured:  # fmt: skip
    """Serve ``requests`` and wait for the last token.

    Args:
        concurrency: so many at a time: when one ends the next arrives. None: all arrive at once.
        gaps: note the time between tokens, too, which costs a little.

    Raises:
        LmdeployError: the error of a request that failed.
    """
    requests = list(requests)
    before = core.stats()
    waits = _Waits(core.executor)
    core.executor = waits
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    sent: dict[str, float] = {}
    between: list[float] = []
    counts = dict.fromkeys((request.id for request in requests), 0)
    at_once = len(requests) if concurrency is None else concurrency
    later = iter(requests[at_once:])
    gc.collect()
    gc.freeze()
    gc.disable()
    begin = time.perf_counter()
    try:
        for request in requests[:at_once]:
            core.submit(request)
            sent[request.id] = 0.0
        while not core.idle:
            deltas = core.step()
            now = time.perf_counter() - begin
            for delta in deltas:
                if delta.finish is not None and delta.finish.error is not None:
                    raise delta.finish.error
                name = delta.id
                if delta.tokens:
                    if not counts[name]:
                        first[name] = now
                    elif gaps:
                        between.append(now - last[name])
                    counts[name] += len(delta.tokens)
                    last[name] = now
                if delta.finish is not None and (following := next(later, None)) is not None:
                    core.submit(following)
                    sent[following.id] = now
        seconds = time.perf_counter() - begin
    finally:
        core.executor = waits.inner
        gc.enable()
        gc.unfreeze()
    stats = core.stats()
    return Measured(
        requests=len(requests), prompt_tokens=sum(len(request.tokens) for request in requests),
        output_tokens=sum(counts.values()), seconds=seconds,
        first=[now - sent[name] for name, now in first.items()],
        per_token=[(last[name] - first[name]) / (count - 1) for name, count in counts.items() if count > 1],
        steps=stats.steps - before.steps, waited=waits.seconds, preemptions=stats.preemptions - before.preemptions,
        gaps=between)
