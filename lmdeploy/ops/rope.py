"""Rotary position embedding in the half-split ("neox") order: its tables, and what is done with them."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.ops.norm import rms_norm
from lmdeploy.ops.table import op
from lmdeploy.ops.write_kv import write_kv


@op
def rope_tables(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``positions [T] int32`` for ``frequencies [R / 2] float32``, times ``factor``.

    Returns:
        The tables of :func:`rope`: two ``[T, 1, R] float32``.
    """
    angles = positions.float()[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@op
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[i], x[i + R/2])`` of the first R channels by the token's angles; the rest passes.

    Args:
        x: ``[T, heads, D]``.
        cos: ``[T, 1, R] float32``, R <= D even: the cosines twice, side by side.
        sin: ``[T, 1, R] float32``: the negated sines, then the sines.

    Returns:
        ``[T, heads, D] float32``, new memory.
    """
    rotated = cos.shape[-1]
    head, half = x[..., :rotated].float(), rotated // 2
    turned = torch.cat((head[..., half:], head[..., :half]), -1)
    out = (head * cos).add_(turned.mul_(sin))
    return out if rotated == x.shape[-1] else torch.cat((out, x[..., rotated:].float()), -1)


@op
def rope_write_kv(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
                  k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> Tensor:  # fmt: skip
    """Normalise (where there are weights) and rotate queries and keys, store keys and values in the cache.

    Args:
        qkv: ``[T, heads + 2 * kv_heads, D]``.
        cos, sin: as for :func:`rope`.
        q_weight, k_weight: ``[D]`` of the per-head norms, or None.
        k_pages, v_pages, slots: as for :func:`lmdeploy.ops.write_kv.write_kv`.

    Returns:
        The queries ``[T, heads, D]`` of qkv's dtype.
    """
    kv_heads = k_pages.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm.reference(q, q_weight, eps), rms_norm.reference(k, k_weight, eps)
    write_kv.reference(rope.reference(k, cos, sin), v, k_pages, v_pages, slots)
    return rope.reference(q, cos, sin).to(qkv.dtype)
