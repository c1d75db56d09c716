"""RMS norm, alone and after a residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.ops.table import op


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``, of x's dtype or float32.

    Returns:
        ``[..., D]`` of x's dtype. A row's bits depend on that row alone.
    """
    f = x.float()
    scale = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return (f * scale).mul_(weight).to(x.dtype)


@op
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; returns ``(rms_norm(s), s)``, both ``[..., D]`` of x's dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total


@op
def norm_add_rms_norm(x: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor,
                      eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``add_rms_norm(rms_norm(x, post_weight, eps), residual, weight, eps)``: a norm on both sides of the addition."""
    return add_rms_norm(rms_norm(x, post_weight, eps), residual, weight, eps)
