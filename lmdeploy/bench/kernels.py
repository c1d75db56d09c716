"""``bench kernels``: every kernel of a device beside its bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lmdeploy.bench import probes
from lmdeploy.bench.device import DeviceFacts, measure_peak, measure_roof, seconds_per_call
from lmdeploy.bench.products import products
from lmdeploy.bench.report import Environment
from lmdeploy.bench.roofline import Roof
from lmdeploy.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Figure:
    """One kernel.

    Attributes:
        gb_per_s, tflops: what it reached, of the bytes and operations that the work needs at least.
        bound_us: the larger of the times for the bytes at the copy rate and for the operations at the peak;
            ``bound_by``: ``'memory'`` or ``'compute'``. ratio: ``bound_us`` by the time; above 1 a cache has helped.
    """

    name: str
    shape: str
    implementation: str
    microseconds: float
    gb_per_s: float
    tflops: float
    bound_us: float
    bound_by: str
    ratio: float


@dataclass(slots=True)
class KernelReport:
    """All figures, and what they are of."""

    benchmark: str
    environment: Environment
    device: DeviceFacts
    model: str
    dtype: str
    context: int
    roof: Roof
    figures: list[Figure]


@torch.inference_mode()
def measure(config: ModelConfig, model: str, device: torch.device, dtype: torch.dtype, rows: Sequence[int],
            context: int, only: str = '', roof: Roof | None = None,
            quants: Sequence[str] = ()) -> KernelReport:  # fmt: skip
    """Measure all kernels of a device at a model's shapes.

    Args:
        rows: tokens of a step, one after another.
        context: cached tokens of a row, and the length of the prompt.
        only: measure those alone whose name contains it.
        quants: formats of weights, keys of ``bench.shapes.QUANTISED``, to multiply with beside dense ones.
    """
    roof = roof or measure_roof(device, dtype)
    figures: list[Figure] = []
    peaks = {'': roof.peak}
    for count in rows:
        bench = probes.Bench(config, device, dtype, count, context, only)
        for probe in _probes(bench, count == rows[0], quants):
            if probe.inputs not in peaks:
                peaks[probe.inputs] = measure_peak(device, probe.inputs) or roof.peak
            figures.append(_figure(probe, device, replace(roof, peak=peaks[probe.inputs])))
    return KernelReport('kernels', Environment(), DeviceFacts.of(device), model, str(dtype).removeprefix('torch.'),
                        context, roof, figures)


def _probes(bench: probes.Bench, first: bool, quants: Sequence[str]) -> Iterator[probes.Probe]:
    for quant in ('', *quants):
        yield from products(bench, quant)
    for probe in probes.attention(bench):
        if first or probe.name != 'attention prompt':  # which does not depend on the rows
            yield probe
    yield from probes.ops(bench)


def _figure(probe: probes.Probe, device: torch.device, roof: Roof) -> Figure:
    seconds = seconds_per_call(probe.calls, device)
    memory, compute = probe.bytes / roof.copy, probe.flops / roof.peak
    bound = max(memory, compute)
    return Figure(probe.name, probe.shape, probe.implementation, 1e6 * seconds, probe.bytes / seconds / 1e9,
                  probe.flops / seconds / 1e12, 1e6 * bound, 'memory' if memory >= compute else 'compute',
                  bound / seconds)
