"""How far two computations of the same may differ, from the type of the result and the length of the sums."""

from __future__ import annotations

import math

import torch


def tolerance(dtype: torch.dtype, size: float = 1.0, length: int = 1) -> dict[str, float]:
    """``atol`` and ``rtol`` for results of ``dtype``.

    Args:
        size: magnitude of the terms.
        length: how many terms of that size are summed, in float32, with errors that add up like a random walk.
    """
    step, sums = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return {'atol': size * (4 * step + 4 * sums * math.sqrt(length)), 'rtol': 4 * step}
