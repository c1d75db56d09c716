"""The face of attention backends, and their choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmdeploy.kv.cache import KVCache, KVLayer
from lmdeploy.ops import plugins
from lmdeploy.ops.kv_codes import KeyBasis, KeyOffset
from lmdeploy.ops.norm import rms_norm
from lmdeploy.ops.rope import rope
from lmdeploy.runner.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """What a model asks of attention, all layers together.

    Attributes:
        windows: the distinct sliding windows of its layers; 0 is a full layer.
        bits: of the codes that the cache holds; 0: it holds numbers.
        offset: something is taken off the keys before they become codes.
    """

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = (0,)
    bits: int = 0
    offset: bool = False


@dataclass(frozen=True, slots=True)
class Rotation:
    """What is done to the queries and keys of one layer.

    Attributes:
        cos, sin: ``[T, 1, R] float32``, see :func:`lmdeploy.ops.rope.rope`.
        q_weight, k_weight: ``[D]`` of the norms over each head before it, with ``eps``; None: there are none.
        offset: what is taken off the keys before they become codes, if anything.
        basis: the axes of keys in codes of 4 bits; None: those of the Hadamard matrix.
    """

    cos: Tensor
    sin: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 1e-6
    offset: KeyOffset | None = None
    basis: KeyBasis | None = None

    def split(self, qkv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[T, heads, D]`` and keys ``[T, kv_heads, D]``, float32, and values, of qkv's dtype.

        The offset is off the keys.
        """
        heads = qkv.shape[1] - 2 * kv_heads
        q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
        normed = self.q_weight is not None and self.k_weight is not None
        if not normed and self.offset is None:
            qk = rope(qkv[:, :-kv_heads], self.cos, self.sin)
            return qk[:, :heads], qk[:, heads:], v
        if self.q_weight is not None and self.k_weight is not None:
            q, k = rms_norm(q, self.q_weight, self.eps), rms_norm(k, self.k_weight, self.eps)
        if self.offset is not None:
            k = k.float() - self.offset.values
        return rope(q, self.cos, self.sin), rope(k, self.cos, self.sin), v


class AttentionBackend(Protocol):
    """Rotates a step's queries and keys, writes keys and values into the cache and attends over it.

    ``prepare`` runs once per step and may synchronise and allocate; what it returns is put into ``batch.plan``. ``run``
    runs once per layer and may do neither. A backend that is ``static`` serves static batches too, on which ``prepare``
    may neither synchronise nor allocate outside the graph that is being recorded.

    ``bits`` are those of the codes whose pages it serves (see :class:`lmdeploy.kv.format.Codes`); 0: pages of numbers.
    """

    name: str
    static: bool
    bits: tuple[int, ...]

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]: ...

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> Any: ...

    def run(self, qkv: Tensor, rotation: Rotation, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        """``qkv [T, heads + 2 * kv_heads, D]``, as the model computes it, gives ``[T, heads, D]`` of its dtype."""
        ...


_registered: list[AttentionBackend] = []  # others' backends, the newest first


def register(backend: AttentionBackend) -> AttentionBackend:
    """Put ``backend`` before all present ones."""
    _registered.insert(0, backend)
    return backend


def withdraw(backend: AttentionBackend) -> None:
    """Take a registered backend out again."""
    _registered.remove(backend)


def candidates() -> tuple[AttentionBackend, ...]:
    """All backends in the order of their choice: registered ones, then ours, the best first."""
    from lmdeploy.attention.cpu import CPUSpans
    from lmdeploy.attention.reference import Reference
    from lmdeploy.attention.triton_paged import TritonPaged

    plugins.load()
    return *_registered, CPUSpans(), TritonPaged(), Reference()


def reasons_against(backend: AttentionBackend, device: torch.device, dtype: torch.dtype,
                    case: AttentionCase) -> list[str]:  # fmt: skip
    """Why ``backend`` does not serve ``case``."""
    unknown = [] if case.bits in backend.bits else [f'does not read a KV cache of {case.bits}-bit codes']
    return unknown + backend.refuse(case, device, dtype)


def choose(device: torch.device, dtype: torch.dtype, case: AttentionCase) -> AttentionBackend:
    """The first backend without a reason against it; the reference has none."""
    return next(backend for backend in candidates() if not reasons_against(backend, device, dtype, case))


def explain(device: torch.device, dtype: torch.dtype, case: AttentionCase) -> str:
    """One line per backend: chosen, ready, or the reasons against it."""
    chosen, lines = choose(device, dtype, case), []
    for backend in candidates():
        against = '; '.join(reasons_against(backend, device, dtype, case))
        lines.append(f'attention: {backend.name}: {"chosen" if backend.name == chosen.name else against or "ready"}')
    return '\n'.join(lines)
