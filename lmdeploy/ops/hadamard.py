"""The block Hadamard transform of a layer's inputs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lmdeploy.ops.table import op


@op
def hadamard(x: Tensor, block: int) -> Tensor:
    """Every ``block`` neighbouring channels times the orthogonal Hadamard matrix of that size.

    It spreads what is large in one channel over all of a block, and is its own inverse. Computed in float32, rounded
    once.

    Args:
        x: ``[..., in]``. block: a power of two that divides ``in``.

    Returns:
        ``[..., in]`` of the type of x.
    """
    blocks = x.float().unflatten(-1, (-1, block)) @ matrix(block, x.device)
    return blocks.flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
def matrix(size: int, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix ``[size, size] float32`` over the root of its size: symmetric and orthogonal.

    Raises:
        ValueError: ``size`` is no power of two.
    """
    if size < 1 or size & size - 1:
        raise ValueError(f'{size} is no power of two')
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return (made / size**0.5).to(device, torch.float32)
