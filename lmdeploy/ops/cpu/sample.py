"""Drawing tokens on a CPU without sorting the vocabulary: exact, by blocks.

The K best of V logits lie in the K blocks with the largest maxima, and block maxima are cheap (one vectorised pass).
A row is ranked to 64 tokens first; where its cuts need more, or a tie crosses the edge of what was ranked, that row
alone is ranked deeper. Which tokens come out depends on the row only: the ranking is canonical at every depth.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmdeploy.ops import sample as reference

DEPTHS = (64, 1024)  # then the whole row
BLOCK = 64


@reference.greedy.impl('cpu')
def greedy(logits: Tensor) -> Tensor:
    """See :func:`lmdeploy.ops.sample.greedy`; about 10 times faster than ``argmax``."""
    blocks = _blocks(logits, BLOCK, float('-inf'))
    best = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(best)), best].argmax(-1)
    return best * BLOCK + inside


@reference.ranked.impl('cpu')
def ranked(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`lmdeploy.ops.sample.ranked`."""
    rows, vocab = logits.shape
    if k == 0:
        return logits[:, :0], torch.empty(rows, 0, dtype=torch.int64)
    out_values, out_ids = logits.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    todo = torch.arange(rows)
    for depth in _depths(vocab, k + 1):
        values, ids = _top(logits[todo], depth)
        done = _settled(values, k, vocab)
        out_values[todo[done]], out_ids[todo[done]] = values[done, :k], ids[done, :k]
        todo = todo[~done]
        if not len(todo):
            break
    return out_values, out_ids


@reference.draw.impl('cpu')
def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """See :func:`lmdeploy.ops.sample.draw`."""
    vocab = logits.shape[-1]
    out = torch.empty(len(logits), dtype=torch.int64)
    cut = reference.truncates(top_k, top_p, min_p, vocab)
    for rows, of in ((torch.nonzero(cut).squeeze(-1), _draw_ranked), (torch.nonzero(~cut).squeeze(-1), _draw_plain)):
        if len(rows) == len(logits):
            return of(logits, temperature, top_k, top_p, min_p, uniform)
        if len(rows):
            out[rows] = of(*(t[rows] for t in (logits, temperature, top_k, top_p, min_p, uniform)))
    return out


def _draw_plain(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
                uniform: Tensor) -> Tensor:
    """Rows that cut nothing: first the block, then the token inside it."""
    weights = _weights(logits, temperature)
    blocks = _blocks(weights, BLOCK, 0.0)
    masses = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = torch.minimum(uniform * masses[:, -1], torch.nextafter(masses[:, -1], torch.zeros_like(uniform)))
    block = torch.searchsorted(masses, goal[:, None], right=True).squeeze(-1)
    before = torch.where(block > 0, masses.gather(-1, (block - 1).clamp(min=0)[:, None]).squeeze(-1), 0.0)
    sums = blocks[torch.arange(len(block)), block].cumsum(-1, dtype=torch.float64)
    goal = torch.minimum(goal - before, torch.nextafter(sums[:, -1], torch.zeros_like(uniform)))
    return block * BLOCK + torch.searchsorted(sums, goal[:, None], right=True).squeeze(-1)


def _draw_ranked(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
                 uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    limit = reference.limits(top_k, vocab)
    total = torch.zeros(rows, dtype=torch.float64)  # the whole row's mass, where top-k is off and top-p on
    full = torch.nonzero((limit == vocab) & (top_p < 1)).squeeze(-1)
    if len(full):
        blocks = _blocks(_weights(logits[full], temperature[full]), BLOCK, 0.0)
        total[full] = blocks.sum(-1, dtype=torch.float64).sum(-1)
    todo = torch.arange(rows)
    for depth in _depths(vocab, 1):
        part = logits if len(todo) == rows else logits[todo]
        values, ids = _top(part, depth)
        weights = ((values - values[:, :1]) / temperature[todo, None]).exp()
        sums = weights.cumsum(-1, dtype=torch.float64)
        bound = limit[todo]
        within = sums.gather(-1, bound.clamp(max=depth)[:, None] - 1).squeeze(-1)
        mass = torch.where(bound == vocab, total[todo], within)
        kept = reference.keep(weights, sums, bound, mass[:, None], top_p[todo], min_p[todo])
        done = _settled(values, kept, vocab) & ((bound <= depth) | (bound == vocab))
        place = reference.invert(sums[done], kept[done], uniform[todo[done]])
        out[todo[done]] = ids[done].gather(-1, place[:, None]).squeeze(-1)
        todo = todo[~done]
        if not len(todo):
            break
    return out


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities relative to the best token's, ``[R, V] float32``."""
    return logits.sub(logits.amax(-1, keepdim=True)).div_(temperature[:, None]).exp_()


def _depths(vocab: int, least: int) -> list[int]:
    return [depth for depth in DEPTHS if least <= depth < vocab] + [vocab]


def _settled(values: Tensor, kept: Tensor | int, vocab: int) -> Tensor:
    """``[R] bool``: the first ``kept`` ranked tokens are certain: none of them ties with the edge of the ranking."""
    depth = values.shape[-1]
    if depth == vocab:
        return torch.ones(len(values), dtype=torch.bool)
    if isinstance(kept, int):
        return values[:, kept - 1] > values[:, -1]
    last = values.gather(-1, kept.clamp(max=depth)[:, None] - 1).squeeze(-1)
    return (kept < depth) & (last > values[:, -1])


def _top(logits: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The ``depth`` best tokens of each row in canonical order; those that tie with the last of them are arbitrary."""
    vocab = logits.shape[-1]
    if depth == vocab:
        return reference.ranked.reference(logits, vocab)
    size = 1 << max(3, ((vocab // depth).bit_length() // 2))  # about sqrt(V / depth) balances the two passes
    size = BLOCK if depth == DEPTHS[0] and size >= BLOCK // 2 else size
    count = -(-vocab // size)
    if count <= depth:
        values, ids = logits.topk(depth, sorted=False)
    else:
        blocks = _blocks(logits, size, float('-inf'))
        best = blocks.amax(-1).topk(depth, sorted=False).indices
        spots = (best[:, :, None] * size + torch.arange(size)).flatten(1)
        some = blocks.gather(1, best[:, :, None].expand(-1, -1, size)).flatten(1)
        values, inside = some.topk(depth, sorted=False)
        ids = spots.gather(1, inside)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _blocks(x: Tensor, size: int, fill: float) -> Tensor:
    """``[R, V] -> [R, ceil(V / size), size]``; a copy only where V is not a multiple of ``size``."""
    rest = x.shape[-1] % size
    if rest:
        x = F.pad(x, (0, size - rest), value=fill)
    return x.unflatten(-1, (-1, size))
