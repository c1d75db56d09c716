"""Drawing tokens from logits: the contract, its reference, and the counter-based random numbers.

Contract, for R rows of a vocabulary of V tokens, every row by its own parameters and independent of the others:

* ``greedy(logits)``: the token of the largest logit, the lowest id among equals.
* ``ranked(logits, k)``: the k best tokens, largest logit first and the lower id first among equals.
* ``draw(...)``: temperature, then top-k, top-p, min-p, then a draw. All three cuts keep a prefix of the ranking: the k
  best; of those the shortest prefix with at least ``top_p`` of their mass; of those the tokens at least ``min_p``
  times as probable as the best. The draw inverts the cumulative distribution at ``uniform``: over the ranking where a
  row cuts anything off, else over the tokens in order of their ids, which needs no ranking.

Cumulative sums are float64, so that the thresholds do not depend on how an implementation adds.
The reference never waits for the device; it sorts whole rows. :mod:`lmdeploy.ops.cpu.sample` does without sorting.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmdeploy.ops.table import op

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The number in [0, 1) that draw ``draws[i]`` of the stream ``seeds[i]`` uses: a pure function of the two.

    SplitMix64 (Steele, Lea, Flood 2014) with random access: its state after n steps is ``start + n * golden``. Starts
    are mixed seeds, so that streams of neighbouring seeds are unrelated.

    Args:
        seeds: ``[R] uint64``. draws: ``[R]`` non-negative integers.

    Returns:
        ``[R] float64``, multiples of 2^-53.
    """
    with np.errstate(over='ignore'):
        state = _mix(seeds.astype(np.uint64) + _GOLDEN) + (draws.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@op
def greedy(logits: Tensor) -> Tensor:
    """``[R, V] float32 -> [R] int64``."""
    return logits.argmax(-1)


@op
def ranked(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``[R, V] float32`` -> the k best ``(values [R, k] float32, ids [R, k] int64)``."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


@op
def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row.

    Args:
        logits: ``[R, V] float32``; -inf bans a token, at least one per row is finite.
        temperature: ``[R] float32``, positive. top_k: ``[R] int64``, 0 is off. top_p: ``[R] float64`` in (0, 1].
        min_p: ``[R] float32`` in [0, 1]. uniform: ``[R] float64`` in [0, 1).

    Returns:
        ``[R] int64`` tokens; none of probability 0.
    """
    vocab = logits.shape[-1]
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    cut = truncates(top_k, top_p, min_p, vocab)[:, None]
    values, ids = ranked.reference(scaled, vocab)
    weights = torch.where(cut, values, scaled).exp()
    sums = weights.cumsum(-1, dtype=torch.float64)
    limit = limits(top_k, vocab)
    kept = keep(weights, sums, limit, sums.gather(-1, limit[:, None] - 1), top_p, min_p)
    place = invert(sums, kept, uniform)
    return torch.where(cut, ids, torch.arange(vocab, device=ids.device)).gather(-1, place[:, None]).squeeze(-1)


def truncates(top_k: Tensor, top_p: Tensor, min_p: Tensor, vocab: int) -> Tensor:
    """``[R] bool``: rows that cut tokens off."""
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)


def limits(top_k: Tensor, vocab: int) -> Tensor:
    """``[R] int64``: how many tokens top-k leaves."""
    return torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)


def keep(weights: Tensor, sums: Tensor, limit: Tensor, total: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """How many of the ranked tokens the three cuts leave, at least 1.

    Args:
        weights: ``[R, K] float32``, relative to the best token's 1, descending. sums: ``[R, K] float64``, cumulative.
        limit: ``[R] int64`` from top-k. total: ``[R, 1] float64``, mass of the tokens that top-k leaves.

    Returns:
        ``[R] int64``, at most ``limit``.
    """
    by_mass = (sums < top_p[:, None] * total).sum(-1) + 1
    by_mass = torch.where(top_p < 1, by_mass, limit)
    by_share = (weights >= min_p[:, None]).sum(-1)
    return torch.minimum(limit, torch.minimum(by_mass, by_share)).clamp(min=1)


def invert(sums: Tensor, kept: Tensor, uniform: Tensor) -> Tensor:
    """``[R] int64``: the place, below ``kept``, where the cumulative sums pass the share ``uniform`` of their mass."""
    mass = sums.gather(-1, kept[:, None] - 1).squeeze(-1)
    goal = torch.minimum(uniform * mass, torch.nextafter(mass, torch.zeros_like(mass)))
    return torch.searchsorted(sums, goal[:, None], right=True).squeeze(-1)
