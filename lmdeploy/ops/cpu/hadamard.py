"""The block Hadamard transform as a product in bfloat16, where oneDNN has one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lmdeploy.ops.cpu import features
from lmdeploy.ops.hadamard import hadamard, matrix
from lmdeploy.ops.table import OpCase


def _refuse(case: OpCase) -> list[str]:
    if case.dtype is not torch.bfloat16:
        return ['bfloat16 only']
    return [] if features.packed_linear(case.dtype) else ['oneDNN does not multiply bfloat16 here']


@hadamard.impl('cpu', when=_refuse)
def product_hadamard(x: Tensor, block: int) -> Tensor:
    """Entries of the matrix are rounded: all alike and by at most 1.1e-4, a tenth of what rounding the result costs."""
    return (x.reshape(-1, block) @ _matrix(block, x.device)).view(x.shape)


@lru_cache(maxsize=16)
def _matrix(block: int, device: torch.device) -> Tensor:
    return matrix(block, device).to(torch.bfloat16)
