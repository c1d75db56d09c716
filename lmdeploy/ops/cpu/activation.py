"""Gated activations of which an element's bits depend on that element alone.

torch's fused silu and gelu take another path for the elements that do not fill a vector register, and which elements
those are depends on the shape and the number of threads: bits would change with the neighbours. Here every step is
exactly rounded (+, -, *, /) or goes through exp and tanh, whose bits do not depend on the place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmdeploy.ops.activation import gelu_tanh_mul, silu_mul

_CACHED = 1 << 17  # elements that are worked on at a time: the float32 copies stay in the second-level cache


def _by_rows(x: Tensor, step) -> Tensor:
    """Apply ``step(gate, up, out)`` to groups of rows of ``x [..., 2 I]``; returns ``[..., I]``."""
    flat = x.reshape(-1, x.shape[-1])
    half = x.shape[-1] // 2
    out = torch.empty(flat.shape[0], half, dtype=x.dtype)
    rows = max(1, _CACHED // half)
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows]
        step(part[:, :half], part[:, half:], out[start : start + rows])
    return out.view(*x.shape[:-1], half)


def _silu_step(gate: Tensor, up: Tensor, out: Tensor) -> None:
    gate = gate.float()
    torch.mul(torch.div(gate, torch.neg(gate).exp_().add_(1.0)), up, out=out)


def _gelu_step(gate: Tensor, up: Tensor, out: Tensor) -> None:
    gate = gate.float()
    inner = (gate * gate).mul_(0.044715).add_(1.0).mul_(gate).mul_(math.sqrt(2.0 / math.pi))
    torch.mul(inner.tanh_().add_(1.0).mul_(gate).mul_(0.5), up, out=out)


@silu_mul.impl('cpu')
def exact_silu_mul(x: Tensor) -> Tensor:
    return _by_rows(x, _silu_step)


@gelu_tanh_mul.impl('cpu')
def exact_gelu_tanh_mul(x: Tensor) -> Tensor:
    return _by_rows(x, _gelu_step)
