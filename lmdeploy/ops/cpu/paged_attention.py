"""Paged attention on the CPU: batched products of query tiles with spans of keys, joined in a fixed order.

The order in which a query's sums run depends on its position alone (see :mod:`lmdeploy.ops.cpu.spans`), so its
result has the same bits in a decode step, in a prefill chunk of any size, and beside any other rows. The products run
in float32, whose batched form is bit-stable for row counts that are multiples of 8 and for trailing zeros within 256
summands; a test states both facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kv.cache import PAGE, KVLayer
from lmdeploy.ops.cpu.spans import NEVER, SPAN, Chunk, Leaf, Node, Shape, build_chunks
from lmdeploy.ops.kv_codes import KeyBasis, KeyOffset, dequantise, hadamard
from lmdeploy.ops.paged_attention import paged_attention
from lmdeploy.ops.rope import rope

Partial = tuple[Tensor, Tensor]  # result [tiles, kv_heads, rows, D] and log-sum-exp [tiles, kv_heads, rows] so far


@dataclass(slots=True)
class Queries:
    """The query tiles of a chunk, and what they are to meet.

    Attributes:
        tiles: ``[tiles, kv_heads, rows, D] float32``, scaled, as they meet the keys of the pages.
        plain: the same as they meet the keys' offset.
    """

    tiles: Tensor
    plain: Tensor
    layer: KVLayer
    offset: KeyOffset | None


def attend(q: Tensor, layer: KVLayer, chunks: Sequence[Chunk], scale: float, dtype: torch.dtype,
           offset: KeyOffset | None = None, basis: KeyBasis | None = None) -> Tensor:  # fmt: skip
    """As :func:`paged_attention`, with the step's chunks made before; returns ``[T, heads, D]`` of ``dtype``.

    Args:
        layer: pages of numbers, or of codes, from whose keys ``offset`` is off, and which have the axes ``basis``.
    """
    tokens, heads, dim = q.shape
    kv_heads = layer.k.shape[1]
    turned = layer.k_scales is not None and layer.k.shape[-1] != dim
    group = heads // kv_heads
    whole = tokens == sum(len(chunk.tokens) for chunk in chunks)
    out = torch.empty(tokens, heads, dim, dtype=dtype) if whole else torch.zeros(tokens, heads, dim, dtype=dtype)
    for chunk in chunks:
        tiles = _tiles(q, chunk, kv_heads, scale)
        queries = Queries(_as_coded(tiles, basis) if turned else tiles, tiles, layer, offset)
        result, _ = _evaluate(chunk.root, queries, isinstance(chunk.root, tuple))
        shape = (chunk.count, kv_heads, chunk.size, group, dim)
        result = result[:, :, : chunk.size * group].view(shape).transpose(1, 2)
        if chunk.first >= 0:
            out[chunk.first : chunk.first + chunk.count * chunk.size].view(result.shape).copy_(result)
        else:
            filled = result.reshape(-1, heads, dim).index_select(0, chunk.filled)
            out.index_copy_(0, chunk.tokens, filled.to(dtype))
    return out


def _tiles(q: Tensor, chunk: Chunk, kv_heads: int, scale: float) -> Tensor:
    """``[tiles, kv_heads, rows, D] float32``, scaled: a tile's rows run over its queries, then over a group's heads."""
    dim = q.shape[-1]
    first = chunk.first
    q = q[first : first + chunk.count * chunk.size] if first >= 0 else q.index_select(0, chunk.queries)
    q = q.view(chunk.count, chunk.size, kv_heads, -1, dim).transpose(1, 2)
    group = q.shape[3]
    used = chunk.size * group
    shape = (chunk.count, kv_heads, chunk.rows, dim)
    tiles = torch.empty(shape) if used == chunk.rows else torch.zeros(shape)
    torch.mul(q, scale, out=tiles[:, :, :used].view(chunk.count, kv_heads, chunk.size, group, dim))
    return tiles


def _as_coded(tiles: Tensor, basis: KeyBasis | None) -> Tensor:
    """Tiles as they meet codes of 4 bits."""
    if basis is None:
        return hadamard(tiles)
    count, kv_heads, rows, dim = tiles.shape
    turned = torch.bmm(tiles.transpose(0, 1).reshape(kv_heads, -1, dim), basis.queries)
    return turned.view(kv_heads, count, rows, dim).transpose(0, 1).contiguous()


def _evaluate(node: Node, queries: Queries, inner: bool) -> Partial:
    if isinstance(node, Leaf):
        return _leaf(node, queries, inner)
    left, right = (_evaluate(child, queries, True) for child in node)
    return _join(torch.stack((left[0], right[0]), 1), torch.stack((left[1], right[1]), 1))


def _read(pages: Tensor, scales: Tensor | None, leaf: Leaf, dim: int) -> Tensor:
    """``[pairs * kv_heads, width, D] float32``."""
    rows = pages.view(-1, PAGE * pages.shape[-1]).index_select(0, leaf.pages).view(-1, leaf.width, pages.shape[-1])
    if scales is None:
        return rows.float()
    pairs = scales.view(-1, PAGE * 2).index_select(0, leaf.pages).view(-1, leaf.width, 2)
    return dequantise(rows, pairs, dim)


def _offset_scores(queries: Queries, offset: KeyOffset, leaf: Leaf) -> Tensor:
    """``[pairs, kv_heads, rows, width]``: what the keys' offset adds to the scores, see :class:`KeyOffset`."""
    count, kv_heads, rows, dim = queries.plain.shape
    plain = queries.plain if leaf.tiles is None else queries.plain.index_select(0, leaf.tiles)
    table = offset.turns.back(SPAN, int(leaf.spans.max()) + 1).index_select(0, leaf.spans)
    back = rope(plain.view(len(plain), kv_heads * rows, dim), table[:, :1], table[:, 1:])
    back = back.view(-1, kv_heads, rows, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    scores = torch.bmm(back, offset.within[:, : leaf.width].transpose(1, 2))
    return scores.view(kv_heads, -1, rows, leaf.width).transpose(0, 1)


def _leaf(leaf: Leaf, queries: Queries, inner: bool) -> Partial:
    """All pairs of a leaf. The log-sum-exp is only made where a join needs it (``inner``, or several columns)."""
    tiles, layer = queries.tiles, queries.layer
    count, kv_heads, rows, dim = tiles.shape
    q = tiles if leaf.tiles is None else tiles.index_select(0, leaf.tiles)
    pairs = q.shape[0]
    k, v = _read(layer.k, layer.k_scales, leaf, dim), _read(layer.v, layer.v_scales, leaf, dim)
    scores = torch.bmm(q.view(-1, rows, dim), k.transpose(1, 2))
    if queries.offset is not None:
        scores.view(pairs, kv_heads, rows, leaf.width).add_(_offset_scores(queries, queries.offset, leaf))
    if leaf.caps is not None:
        size = leaf.caps.shape[2]
        part = scores.view(pairs, kv_heads, size, rows // size, leaf.width)[pairs - leaf.caps.shape[0] :]
        torch.minimum(part, leaf.caps, out=part)
    weights = scores.softmax(-1)
    joined = leaf.columns > 1 or leaf.table is not None
    if not joined and not inner:
        return torch.bmm(weights, v).view(count, kv_heads, rows, dim), scores
    sums = (scores.amax(-1) - weights.amax(-1).log_()).view(pairs, kv_heads, rows)  # the largest weight is 1 / sum
    if leaf.table is None:
        result = torch.bmm(weights, v).view(count, leaf.columns, kv_heads, rows, dim)
        sums = sums.view(count, leaf.columns, kv_heads, rows)
    else:
        result = q.new_zeros(pairs + 1, kv_heads, rows, dim)  # the last one stands for a span that a tile does not see
        torch.bmm(weights, v, out=result[:pairs].view(-1, rows, dim))
        result = result.index_select(0, leaf.table).view(count, leaf.columns, kv_heads, rows, dim)
        sums = torch.cat((sums, sums.new_full((1, kv_heads, rows), NEVER)))
        sums = sums.index_select(0, leaf.table).view(count, leaf.columns, kv_heads, rows)
    return _join(result, sums) if joined else (result[:, 0], sums[:, 0])


def _join(result: Tensor, sums: Tensor) -> Partial:
    """Join partial results ``[tiles, n, kv_heads, rows, D]`` and their log-sum-exps over n."""
    top = sums.amax(1, keepdim=True)
    weights = (sums - top).exp_()
    total = _tree_sum(weights)
    return _tree_sum(result * weights[..., None]).div_(total[..., None]), total.log().add_(top[:, 0])


def _tree_sum(x: Tensor) -> Tensor:
    """The sum over dimension 1 in a binary tree of neighbours: zeros at the end change no bit."""
    while x.shape[1] > 1:
        even = x.shape[1] // 2 * 2
        pairs = x[:, 0:even:2] + x[:, 1:even:2]
        x = pairs if even == x.shape[1] else torch.cat((pairs, x[:, even:]), 1)
    return x[:, 0]


@paged_attention.impl('cpu')
def span_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, query_start: Sequence[int],
                   kv_lens: Sequence[int], scale: float, window: int) -> Tensor:  # fmt: skip
    shape = Shape(q.shape[1], k_pages.shape[1], q.shape[2], k_pages.shape[2])
    chunks = build_chunks(list(query_start), list(kv_lens), block_table, shape, window)
    return attend(q, KVLayer(k_pages, v_pages), chunks, scale, q.dtype)
