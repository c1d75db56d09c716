"""Before and after: how far the quantised model's predictions are from the model's own, on held-out text.

Both are predictions for the same tokens, so differences are paired: their standard errors are those of the difference,
over windows of text, and a model that was not changed differs by exactly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.lite.hidden import Hidden, Piece
from lmdeploy.ops.norm import rms_norm

ROWS = 256  # tokens whose logits exist at once


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into predictions: ``norm [hidden]``, ``weight [vocab, hidden]``, both float32."""

    norm: Tensor
    weight: Tensor
    eps: float

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden]`` to ``[n, vocab] float32``."""
        return F.linear(rms_norm.reference(hidden.float(), self.norm, self.eps), self.weight)


@dataclass(slots=True)
class Quality:
    """One text, before and after. Losses are in nats per token.

    Attributes:
        text: which. tokens: predicted ones. windows: pieces of text that are taken as independent.
        before, after: perplexity. increase: their ratio less 1. increase_error: its standard error.
        kl: mean divergence of the predictions, with its standard error.
        agreement: share of tokens whose most probable prediction stays the same.
    """

    text: str
    source: str
    tokens: int
    windows: int
    before: float
    after: float
    increase: float
    increase_error: float
    kl: float
    kl_error: float
    agreement: float


@dataclass(slots=True)
class _Window:
    before: float
    after: float
    kl: float
    same: int
    tokens: int


@torch.no_grad()
def judge(texts: Sequence[tuple[str, str, int]], exact: Hidden, quantised: Hidden, exact_head: Head,
          quantised_head: Head) -> list[Quality]:  # fmt: skip
    """Compare the two streams' predictions.

    Args:
        texts: ``(name, source, sequences)`` of each text, in the order of the streams' sequences.
        exact, quantised: behind the last layer.
    """
    windows = [_window(exact.sequences[i], _rows(exact, i), _rows(quantised, i), exact_head, quantised_head)
               for i in range(len(exact.sequences))]  # fmt: skip
    found, start = [], 0
    for name, source, count in texts:
        found.append(_quality(name, source, windows[start : start + count]))
        start += count
    return found


def _rows(stream: Hidden, index: int) -> Tensor:
    start = sum(len(ids) for ids in stream.sequences[:index])
    return stream.read(Piece(start, 1, len(stream.sequences[index])))[0]


def _window(ids: Tensor, exact: Tensor, quantised: Tensor, exact_head: Head, quantised_head: Head) -> _Window:
    sums = torch.zeros(3, dtype=torch.float64)
    same, count = 0, len(ids) - 1
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        wanted = ids[rows.start + 1 : rows.stop + 1].to(exact.device)
        first = exact_head.logits(exact[rows]).log_softmax(-1)
        second = quantised_head.logits(quantised[rows]).log_softmax(-1)
        losses = (-log.gather(1, wanted[:, None]).sum(dtype=torch.float64) for log in (first, second))
        divergence = (first.exp() * (first - second)).sum(-1).clamp(min=0).sum(dtype=torch.float64)
        sums += torch.stack([*losses, divergence]).cpu()
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
    return _Window(float(sums[0]), float(sums[1]), float(sums[2]), same, count)


def _quality(name: str, source: str, windows: Sequence[_Window]) -> Quality:
    tokens = sum(w.tokens for w in windows)
    before, after = (sum(getattr(w, side) for w in windows) / tokens for side in ('before', 'after'))
    difference = after - before
    error = _error([(w.after - w.before) / w.tokens for w in windows])
    return Quality(
        name, source, tokens, len(windows), math.exp(before), math.exp(after), math.expm1(difference),
        math.exp(difference) * error, sum(w.kl for w in windows) / tokens, _error([w.kl / w.tokens for w in windows]),
        sum(w.same for w in windows) / tokens)  # fmt: skip


def _error(values: Sequence[float]) -> float:
    """The standard error of a mean; 0 for a single value, which tells nothing of it."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
