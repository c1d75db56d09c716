"""Layer norm after a residual addition, as the towers of vision models have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.table import op


@op
def add_layer_norm(x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor,
                   eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``s = residual + x * scale``; returns ``(layer_norm(s), s)``, both ``[T, D]`` of x's dtype.

    Args:
        x, residual: ``[T, D]``, rows contiguous.
        scale: ``[D]``, or None: 1.
        weight, bias: ``[D]`` of the norm, which is computed in float32.
    """
    total = x + residual if scale is None else torch.addcmul(residual, x, scale)
    return F.layer_norm(total, weight.shape, weight, bias, eps), total
