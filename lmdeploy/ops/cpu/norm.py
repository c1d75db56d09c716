"""RMS norm by torch's fused operator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.norm import add_rms_norm, rms_norm


@rms_norm.impl('cpu')
def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dtype != x.dtype:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


@add_rms_norm.impl('cpu')
def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return fused_rms_norm(total, weight, eps), total
