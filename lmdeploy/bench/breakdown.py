"""Where the time of a step goes: the device's recorded graphs, the host's own work, and the device by kernel.

Both runs are apart from those that are reported: looking costs time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmdeploy.bench.measure import run
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput

PROFILED_STEPS = 5
MOST_KERNELS = 20


@dataclass(frozen=True, slots=True)
class GraphTime:
    """The recorded step of so many rows: how often it ran, and its time on the device."""

    rows: int
    count: int
    median_ms: float


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kind of kernel (on a CPU: operator) in a step that decodes; the profiler's own cost is in it."""

    name: str
    us_per_step: float
    count_per_step: float


@dataclass(slots=True)
class Breakdown:
    """Means over the steps of a run, in milliseconds.

    Attributes:
        step_ms: of the run's time; host_ms: of it, what the host does itself. The rest it waits for the device.
        graph_ms: what the recorded steps take on the device, all together, by the run's steps.
    """

    step_ms: float
    host_ms: float
    graph_ms: float
    graphs: list[GraphTime]
    kernels: list[KernelTime]


def breakdown(core: EngineCore, requests: Sequence[EngineInput], again: Sequence[EngineInput], *,
              concurrency: int | None = None) -> Breakdown:  # fmt: skip
    """Run ``requests`` with every graph timed, then start ``again`` and profile a few steps."""
    core.executor.call('time_graphs', True)
    measured = run(core, requests, concurrency=concurrency)
    times: dict[int, list[float]] = {}
    for rows, milliseconds in core.executor.call('time_graphs', False)[0]:
        times.setdefault(rows, []).append(milliseconds)
    steps = max(1, measured.steps)
    graphs = [GraphTime(rows, len(found), statistics.median(found)) for rows, found in sorted(times.items())]
    return Breakdown(1000 * measured.seconds / steps, measured.host_ms, sum(map(sum, times.values())) / steps, graphs,
                     _kernels(core, again[:concurrency]))


def _kernels(core: EngineCore, requests: Sequence[EngineInput]) -> list[KernelTime]:
    from torch.profiler import ProfilerActivity, profile

    gpu = core.scheduler.capacity.device != 'cpu'
    for request in requests:
        core.submit(request)
    begun: set[str] = set()
    at_once = min(len(requests), core.scheduler.capacity.max_batch_size)
    while len(begun) < at_once and not core.idle:  # until all that run at once have begun to answer
        begun.update(delta.id for delta in core.step() if delta.tokens)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as record:
        for _ in range(PROFILED_STEPS):
            core.step()
        if gpu:
            torch.cuda.synchronize()
    for request in requests:
        core.abort(request.id)
    while not core.idle:
        core.step()
    found = []
    for event in record.key_averages():
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        found.append(KernelTime(event.key, microseconds / PROFILED_STEPS, event.count / PROFILED_STEPS))
    return sorted(found, key=lambda kernel: -kernel.us_per_step)[:MOST_KERNELS]
