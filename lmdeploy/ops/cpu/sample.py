"""Drawing tokens on a CPU without sorting the vocabulary, exactly.

A row that cuts nothing off is drawn in two steps, block and token. Rows that do are ranked to 64 tokens, all at once:
the 64 best of V logits lie in the 64 blocks with the largest maxima, and block maxima cost one vectorised pass. A row
that keeps more, or whose ranking ends in a tie, then ranks the tokens above a floor that it keeps nothing below.
The ranking is canonical either way, so which tokens come out depends on the row only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmdeploy.ops import sample as reference

DEPTH = 64  # tokens that are ranked for many rows at once
BLOCK = 64


@reference.greedy.impl('cpu')
def greedy(logits: Tensor) -> Tensor:
    """See :func:`lmdeploy.ops.sample.greedy`; about 10 times faster than ``argmax``."""
    blocks = _blocks(logits, float('-inf'))
    best = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(best)), best].argmax(-1)
    return best * BLOCK + inside


@reference.ranked.impl('cpu')
def ranked(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`lmdeploy.ops.sample.ranked`."""
    rows, vocab = logits.shape
    values, ids = logits.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    if k == 0:
        return values, ids
    rest = list(range(rows))
    if k < DEPTH < vocab:
        best, best_ids = _top(logits)
        values[:], ids[:] = best[:, :k], best_ids[:, :k]
        rest = torch.nonzero(best[:, k - 1] == best[:, -1]).flatten().tolist()
    for row in rest:
        above, above_ids = _above(logits[row], _kth(logits[row], k))
        values[row], ids[row] = above[:k], above_ids[:k]
    return values, ids


@reference.draw.impl('cpu')
def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """See :func:`lmdeploy.ops.sample.draw`."""
    vocab = logits.shape[-1]
    cut = reference.truncates(top_k, top_p, min_p, vocab)
    shallow = cut & ((top_k == 0) | (top_k < DEPTH)) & (vocab > DEPTH)
    arguments = (logits, temperature, top_k, top_p, min_p, uniform)
    tokens = torch.full((len(logits),), -1)
    for kind, rows in ((_draw_plain, ~cut), (_draw_shallow, shallow)):
        if rows.all():
            tokens = kind(*arguments)
        elif rows.any():
            tokens[rows] = kind(*(argument[rows] for argument in arguments))
    for row in torch.nonzero(tokens < 0).flatten().tolist():
        tokens[row] = _draw_deep(*(argument[row : row + 1] for argument in arguments))
    return tokens


def _draw_plain(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
                uniform: Tensor) -> Tensor:
    """Rows that cut nothing off: first the block, then the token inside it."""
    blocks = _blocks(_weights(logits, temperature), 0.0)
    masses = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    nothing = torch.zeros_like(uniform)
    goal = torch.minimum(uniform * masses[:, -1], torch.nextafter(masses[:, -1], nothing))
    block = torch.searchsorted(masses, goal[:, None], right=True).squeeze(-1)
    before = F.pad(masses, (1, 0)).gather(-1, block[:, None]).squeeze(-1)
    sums = blocks[torch.arange(len(block)), block].cumsum(-1, dtype=torch.float64)
    goal = torch.minimum(goal - before, torch.nextafter(sums[:, -1], nothing))
    return block * BLOCK + torch.searchsorted(sums, goal[:, None], right=True).squeeze(-1)


def _draw_shallow(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
                  uniform: Tensor) -> Tensor:
    """Rows that may keep less than DEPTH tokens; -1 where the last one ties with the edge of the ranking."""
    limit = reference.limits(top_k, logits.shape[-1])
    whole = (top_k == 0) & (top_p < 1)
    mass = torch.full_like(uniform, torch.inf)
    if whole.all():
        mass = _mass(_weights(logits, temperature))
    elif whole.any():
        mass[whole] = _mass(_weights(logits[whole], temperature[whole]))
    values, ids = _top(logits)
    tokens, kept = _draw_ranked(values, ids, temperature, limit, top_p, min_p, uniform, mass)
    last = values.gather(-1, kept[:, None] - 1).squeeze(-1)
    return torch.where(last > values[:, -1], tokens, -1)


def _draw_deep(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
               uniform: Tensor) -> Tensor:
    """One row with any cuts.

    With top-k the floor is the k-th best logit. Without, tokens lighter than ``(1 - top_p) * mass / V`` weigh less than
    ``1 - top_p`` of the mass all together, so the others hold the nucleus; half of that is safe from rounding.
    """
    vocab = logits.shape[-1]
    limit = reference.limits(top_k, vocab)
    if limit.item() < vocab:
        values, ids = _above(logits[0], _kth(logits[0], int(limit)))
        unknown = torch.full_like(uniform, torch.inf)
        return _draw_ranked(values[None], ids[None], temperature, limit, top_p, min_p, uniform, unknown)[0]
    weights = _weights(logits, temperature)
    mass = _mass(weights)
    floor = torch.where(top_p < 1, 0.5 * (1 - top_p) * mass / vocab, 0.0)
    ids = torch.nonzero(weights[0] >= torch.maximum(floor, min_p)).squeeze(-1)
    values, order = logits[0, ids].sort(descending=True, stable=True)
    return _draw_ranked(values[None], ids[order][None], temperature, limit, top_p, min_p, uniform, mass)[0]


def _draw_ranked(values: Tensor, ids: Tensor, temperature: Tensor, limit: Tensor, top_p: Tensor, min_p: Tensor,
                 uniform: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from ranked candidates ``[R, K]``: ``(tokens [R], kept [R])``.

    ``mass [R]``: of the whole row, where top-k is off; infinite: that of the best ``limit`` candidates.
    """
    weights = ((values - values[:, :1]) / temperature[:, None]).exp()
    sums = weights.cumsum(-1, dtype=torch.float64)
    limit = limit.clamp(max=values.shape[-1])[:, None]
    total = torch.where(mass.isinf()[:, None], sums.gather(-1, limit - 1), mass[:, None])
    kept = reference.keep(weights, sums, limit.squeeze(-1), total, top_p, min_p)
    place = reference.invert(sums, kept, uniform)
    return ids.gather(-1, place[:, None]).squeeze(-1), kept


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities relative to the best token's, ``[R, V] float32``."""
    return logits.sub(logits.amax(-1, keepdim=True)).div_(temperature[:, None]).exp_()


def _mass(weights: Tensor) -> Tensor:
    """``[R, V] float32 -> [R] float64``."""
    return _blocks(weights, 0.0).sum(-1).sum(-1, dtype=torch.float64)


def _top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The DEPTH best tokens of each row in canonical order; which of those that tie with the last one is arbitrary."""
    blocks = _blocks(logits, float('-inf'))
    if blocks.shape[1] <= DEPTH:
        values, ids = logits.topk(DEPTH, sorted=False)
    else:
        best = blocks.amax(-1).topk(DEPTH, sorted=False).indices[:, :, None]
        values, inside = blocks.gather(1, best.expand(-1, -1, BLOCK)).flatten(1).topk(DEPTH, sorted=False)
        ids = (best * BLOCK + torch.arange(BLOCK)).flatten(1).gather(1, inside)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _kth(row: Tensor, k: int) -> Tensor:
    """The k-th best of ``row [V]``."""
    return row.topk(k, sorted=False).values.amin()


def _above(row: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of ``row [V]`` that reach ``floor``, in canonical order: values and ids."""
    ids = torch.nonzero(row >= floor).squeeze(-1)
    values, order = row[ids].sort(descending=True, stable=True)
    return values, ids[order]


def _blocks(x: Tensor, fill: float) -> Tensor:
    """``[R, V] -> [R, ceil(V / BLOCK), BLOCK]``; a copy only where V is not a multiple of BLOCK."""
    rest = x.shape[-1] % BLOCK
    if rest:
        x = F.pad(x, (0, BLOCK - rest), value=fill)
    return x.unflatten(-1, (-1, BLOCK))
