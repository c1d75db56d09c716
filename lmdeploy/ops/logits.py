"""Changes to logits before tokens are drawn, and what is reported of them.

All functions work on ``logits [R, V] float32`` **in place**, on the rows that their arguments name, without waiting for
the device. Index arguments are int64 tensors on the logits' device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.ops.table import op

_BLOCK = 64


@op
def contain_non_finite(logits: Tensor) -> Tensor:
    """``[R] bool``: the rows without NaN or infinity; the others are filled with 0, so that what follows is defined.

    One reduction tells: a sum of finite float32 logits of any real size is finite.
    """
    finite = logits.sum(-1).isfinite()
    logits.masked_fill_(~finite[:, None], 0.0)
    return finite


def live_rows(logits: Tensor) -> Tensor:
    """``[R] bool``: the rows with a token that is still allowed."""
    return logits.amax(-1) > float('-inf')


def apply_masks(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Ban all tokens of ``rows [M]`` whose bit in ``masks [M, ceil(V / 32)] int32`` is clear."""
    vocab = logits.shape[-1]
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = (bits & 1).flatten(1)[:, :vocab].bool()
    logits[rows] = logits[rows].masked_fill_(~allowed, float('-inf'))


def add_at(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """``logits[rows[i], tokens[i]] += values[i]``; a value of -inf bans a token."""
    logits.view(-1).scatter_add_(0, rows * logits.shape[-1] + tokens, values)


def penalise_repetition(logits: Tensor, rows: Tensor, seen: Tensor, penalty: Tensor) -> None:
    """Divide positive and multiply negative logits of seen tokens by ``penalty [b] float32`` (Keskar et al. 2019).

    Args:
        rows: ``[b]``. seen: ``[b, L]``: the tokens so far; repeats count once.
    """
    flat, at = _flat(logits, rows, seen)
    before, factor = flat.gather(0, at), penalty.repeat_interleave(seen.shape[-1])
    flat.scatter_(0, at, torch.where(before < 0, before * factor, before / factor))


def penalise_presence(logits: Tensor, rows: Tensor, seen: Tensor, penalty: Tensor) -> None:
    """Subtract ``penalty [b] float32`` once from each token of ``seen [b, L]``."""
    flat, at = _flat(logits, rows, seen)
    flat.scatter_(0, at, flat.gather(0, at) - penalty.repeat_interleave(seen.shape[-1]))


def penalise_frequency(logits: Tensor, rows: Tensor, seen: Tensor, counts: Tensor, penalty: Tensor) -> None:
    """Subtract ``penalty [b]`` from each token as often as it stands in the first ``counts [b]`` of ``seen [b, L]``."""
    used = torch.arange(seen.shape[-1], device=seen.device) < counts[:, None]
    values = torch.where(used, -penalty[:, None], 0.0)
    flat, at = _flat(logits, rows, seen)
    flat.scatter_add_(0, at, values.flatten())


@op
def log_normaliser(logits: Tensor) -> Tensor:
    """``[R] float64``: log of the sum of exponentials; the same for a row alone and in any batch."""
    best = logits.amax(-1, keepdim=True)
    weights = (logits - best).exp_()
    blocks = weights.shape[-1] // _BLOCK
    sums = weights[:, : blocks * _BLOCK].unflatten(-1, (blocks, _BLOCK)).sum(-1)
    tail = weights[:, blocks * _BLOCK :].sum(-1, dtype=torch.float64)
    return (sums.sum(-1, dtype=torch.float64) + tail).log() + best.squeeze(-1)


def _flat(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits as one vector, and where ``tokens [b, L]`` of ``rows [b]`` are in it (indexing a vector is fast)."""
    return logits.view(-1), (rows[:, None] * logits.shape[-1] + tokens).flatten()
