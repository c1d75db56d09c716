"""Rounding weights channel after channel, the channels not yet rounded making up for what was lost."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.ops.table import op


@op
def round_columns(targets: Tensor, mixing: Tensor, scales: Tensor, zeros: Tensor | None, low: int, high: int,
                  held: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The inner loop of GPTQ and of coordinate descent: for every input channel j of a block, in order::

        codes[j] = clamp(round(targets[j] / scales[j]) + zeros[j], low, high)
        change[j] = (codes[j] - zeros[j]) * scales[j] - (targets[j] if held is None else held[j])
        targets[k] += mixing[j, k] * change[j]    for all k > j

    Args:
        targets: ``[B, out] float32``, used up. B is at most 128.
        mixing: ``[B, B] float32``, read above its diagonal.
        scales: ``[B, out] float32``, not zero; may be negative. zeros: ``[B, out] float32`` of whole numbers; None: 0.
        low, high: the extreme codes.
        held: ``[B, out] float32``, what the changes count from; None: the targets as they are when their turn comes.

    Returns:
        codes ``[B, out] int16`` and changes ``[B, out] float32``.
    """
    count = len(targets)
    codes, change = torch.empty_like(targets, dtype=torch.int16), torch.empty_like(targets)
    for j in range(count):
        code = targets[j].div(scales[j]).round_()
        if zeros is not None:
            code.add_(zeros[j])
        code.clamp_(low, high)
        codes[j] = code
        if zeros is not None:
            code.sub_(zeros[j])
        torch.sub(code.mul_(scales[j]), targets[j] if held is None else held[j], out=change[j])
        if j + 1 < count:
            targets[j + 1 :].addr_(mixing[j, j + 1 :], change[j])
    return codes, change
