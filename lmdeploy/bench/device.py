"""A device under a stopwatch: how fast it copies and multiplies, which bounds everything else, and how long calls take.

On a GPU calls are recorded as a CUDA graph and replayed, so that the host's time is not theirs. Calls that are measured
for their memory traffic take turns among copies of their tensors, so that no cache holds what they read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmdeploy.bench.roofline import Roof
from lmdeploy.ops.quantize import TYPES
from lmdeploy.runner.host import free_host_memory, processor_name

Call = Callable[[], Any]
GPU_COPY_BYTES, CPU_COPY_BYTES = 1 << 29, 1 << 28
GPU_SIDE, CPU_SIDE = 8192, 2048
ROUNDS = 5
WINDOW_SECONDS = 0.02  # of one measurement: long against the clock, short against a run


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What ran: the accelerator or the processor, by name."""

    kind: str
    name: str
    threads: int
    memory_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        if device.type != 'cpu':
            found = torch.cuda.get_device_properties(device)
            return cls(device.type, found.name, torch.get_num_threads(), found.total_memory)
        return cls('cpu', processor_name(), torch.get_num_threads(), free_host_memory()[1])


def seconds_per_call(calls: Sequence[Call], device: torch.device, *, rounds: int = ROUNDS) -> float:
    """The median time of one of ``calls``, which take turns; each runs once beforehand."""
    for call in calls:
        call()
    return _on_gpu(calls, rounds) if device.type != 'cpu' else _on_cpu(calls, rounds)


def _on_cpu(calls: Sequence[Call], rounds: int) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    once = time.perf_counter() - begin
    times = max(1, int(WINDOW_SECONDS / max(once, 1e-9)))
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(times):
            for call in calls:
                call()
        found.append((time.perf_counter() - begin) / (times * len(calls)))
    return statistics.median(found)


def _on_gpu(calls: Sequence[Call], rounds: int) -> float:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    kept = []
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())  # what a graph writes to must not be handed to the next call
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    once = min(replay(1) for _ in range(2))
    times = max(1, int(WINDOW_SECONDS / max(once, 1e-7)))
    return statistics.median(replay(times) for _ in range(rounds)) / (times * len(calls))


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return seconds_per_call([lambda: target.copy_(source)], device)


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """The device's copy rate over memory that no cache holds, and its peak of large square products in ``dtype``."""
    gpu = device.type != 'cpu'
    size = GPU_COPY_BYTES if gpu else CPU_COPY_BYTES
    copy = 2 * size / _copy_seconds(size, device)
    side = GPU_SIDE if gpu else CPU_SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    peak = 2 * side**3 / seconds_per_call([lambda: a @ b], device)
    return Roof(copy, peak, source=f'measured: a copy of {size >> 20} MiB, a product of {side} x {side} matrices')


def measure_peak(device: torch.device, kind: str) -> float:
    """Operations per second of large square products of numbers of 8 bits, a key of ``ops.quantize.TYPES``, by torch.

    Zero where it has none for the device.
    """
    if device.type == 'cpu':
        return 0.0
    side = GPU_SIDE
    a, b = (torch.randint(-8, 8, (side, side), device=device).to(TYPES[kind]) for _ in range(2))
    if kind == 'int8':
        return 2 * side**3 / seconds_per_call([lambda: torch._int_mm(a, b.t())], device)
    one = torch.ones((), device=device)
    return 2 * side**3 / seconds_per_call([lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)], device)
