"""Gated activations: what a gated MLP does between its two linears."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.table import op


@op
def silu_mul(x: Tensor) -> Tensor:
    """``silu(x[..., :I]) * x[..., I:]``: ``[..., 2 I]`` to ``[..., I]``."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@op
def gelu_tanh_mul(x: Tensor) -> Tensor:
    """``gelu(x[..., :I]) * x[..., I:]`` with the tanh approximation: ``[..., 2 I]`` to ``[..., I]``."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate='tanh') * up


ACTIVATIONS = {'silu': silu_mul, 'gelu_tanh': gelu_tanh_mul}
