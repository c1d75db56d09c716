"""``bench suite``: the four workloads by which engines are usually compared, in one engine that is started once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmdeploy.bench.device import measure_roof
from lmdeploy.bench.offline import Bench, OfflineReport
from lmdeploy.bench.roofline import Roof
from lmdeploy.bench.workload import Workload, fixed, sharegpt_like


@dataclass(slots=True)
class SuiteReport:
    """The reports of the cases, in their order; the start is that of the one engine."""

    benchmark: str
    cases: list[OfflineReport]


def workloads(cases: Sequence[str], seed: int = 0, scale: float = 1.0) -> dict[str, Workload]:
    """``{case: workload}``; ``scale`` below 1 shortens them, for a look.

    * ``1``: one request of 128 tokens with an answer of 512;
    * ``16``, ``256``: so many of 1000 and 1000;
    * ``sharegpt``: 1000 of lengths like conversations'.
    """
    def few(number: int) -> int:
        return max(1, round(number * scale))

    made = {'1': fixed(1, few(128), few(512)), '16': fixed(16, few(1000), few(1000)),
            '256': fixed(256, few(1000), few(1000)), 'sharegpt': sharegpt_like(few(1000), seed=seed)}
    return {case: made[case] for case in cases}


def suite(bench: Bench, loads: dict[str, Workload], *, rounds: int, seed: int, roof: Roof | None = None) -> SuiteReport:
    """Every case in one engine: one request alone as a latency, the others as throughput."""
    roof = roof or measure_roof(bench.device, bench.executor.dtype)
    reports = []
    for load in loads.values():
        measure = bench.latency if len(load) == 1 else bench.throughput
        reports.append(measure(load, rounds=rounds, seed=seed, roof=roof))
    return SuiteReport('suite', reports)
