"""The face of attention backends, and their choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmdeploy.kv.cache import KVCache, KVLayer
from lmdeploy.runner.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """What a model asks of attention, all layers together.

    Attributes:
        windows: the distinct sliding windows of its layers; 0 is a full layer.
    """

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = (0,)


class AttentionBackend(Protocol):
    """Writes a step's keys and values into the cache and attends over it.

    ``prepare`` runs once per step and may synchronise and allocate; what it returns is put into ``batch.plan``. ``run``
    runs once per layer and may do neither. A backend that is ``static`` serves static batches too, on which ``prepare``
    may neither synchronise nor allocate outside the graph that is being recorded.
    """

    name: str
    static: bool

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]: ...

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> Any: ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        """``q [T, heads, D]``, ``k, v [T, kv_heads, D]`` give ``[T, heads, D]`` of v's dtype."""
        ...


def candidates() -> tuple[AttentionBackend, ...]:
    """All backends, the best first."""
    from lmdeploy.attention.cpu import CPUSpans
    from lmdeploy.attention.reference import Reference

    return CPUSpans(), Reference()


def choose(device: torch.device, dtype: torch.dtype, case: AttentionCase) -> AttentionBackend:
    """The first backend without a reason against it; the reference has none."""
    return next(backend for backend in candidates() if not backend.refuse(case, device, dtype))


def explain(device: torch.device, dtype: torch.dtype, case: AttentionCase) -> str:
    """One line per backend: ready, or the reasons against it. The first that is ready is taken."""
    lines = []
    for backend in candidates():
        lines.append(f'attention: {backend.name}: {"; ".join(backend.refuse(case, device, dtype)) or "ready"}')
    return '\n'.join(lines)
