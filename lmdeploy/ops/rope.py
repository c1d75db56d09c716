"""Rotary position embedding in the half-split ("neox") order."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.ops.table import op


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
