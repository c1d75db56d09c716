"""What a step's attention will compute, laid out once per step: tiles of queries against spans of keys.

A *tile* is up to 64 neighbouring queries of one row; a *span* is 256 neighbouring keys of one row, from a multiple of
256 on; a *pair* is a tile and a span that it sees. All pairs of a *leaf* are multiplied as one batch; a leaf takes the
pairs of its tiles within one *octet*, 8 neighbouring spans. The partial results of a tile are joined in a binary tree
over its spans that is fixed by their positions alone. So the order of every sum depends on the positions of the keys
and on nothing else: not on the other rows, the size of the tile, or the blocks the keys lie in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmdeploy.kv.cache import PAGE

SPAN = 256  # the longest inner dimension over which the batched product sums in one fixed order
WIDTHS = (64, 128, 256)  # inner dimensions that give the same bits if what they leave out is zero
OCTET = 8
TILES = (1, 16, 64)  # tile sizes
ROWS = 8  # products of as many rows as a multiple of this are bit-stable; heads above 128 channels need twice that
NEVER = np.float32(-1e30)  # the score of a hidden key: exp(NEVER - any other) is exactly 0, and nothing becomes NaN
BATCH_FLOATS = 1 << 18  # floats of scores, or of keys, that are worked on at a time: they stay in a second-level cache


@dataclass(frozen=True, slots=True)
class Shape:
    """Constants of the model and the cache."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int


@dataclass(slots=True)
class Leaf:
    """P pairs to multiply as one batch.

    Attributes:
        width: keys per pair, one of WIDTHS; the last span of a row may need fewer than SPAN.
        tiles: ``[P] int64`` the pairs' tiles within the chunk; None: pair i is of tile i.
        spans: ``[P] int64`` the pairs' spans.
        pages: ``[P * kv_heads * width / PAGE] int64`` rows of a plane flattened to ``[pages, PAGE * D]``.
        caps: ``[H, 1, tile, 1, width] float32`` upper bounds of the last H pairs' scores: NEVER for what a query must
            not see, else infinity; None: all pairs see everything.
        columns: most pairs that a tile has here.
        table: ``[tiles * columns] int64`` a tile's pairs by their order; P stands for none. None: pairs are in order.
    """

    width: int
    tiles: Tensor | None
    spans: Tensor
    pages: Tensor
    caps: Tensor | None
    columns: int
    table: Tensor | None


Node = Leaf | tuple['Node', 'Node']


@dataclass(slots=True)
class Chunk:
    """Tiles of one size and the tree of their leaves.

    Attributes:
        size: queries per tile.
        count: tiles.
        rows: query rows of one key head in one tile: size times the group of heads, padded to a multiple of
            ``row_step``.
        first: the tiles are full and hold the tokens from this one on, in order; -1: they do not, and then
        queries: ``[count * size] int64`` tokens of the tiles, any where a tile is not full,
        filled: ``[n] int64`` places in ``queries`` that hold a token, and
        tokens: ``[n] int64`` these tokens.
        root: the tree.
    """

    size: int
    count: int
    rows: int
    first: int
    queries: Tensor
    filled: Tensor
    tokens: Tensor
    root: Node


@dataclass(slots=True)
class _Tiles:
    """Arrays of n tiles of one size: their row, first token, number of tokens, position of the first."""

    row: np.ndarray
    token: np.ndarray
    count: np.ndarray
    position: np.ndarray

    def take(self, index: np.ndarray | slice) -> _Tiles:
        return _Tiles(self.row[index], self.token[index], self.count[index], self.position[index])


def build_chunks(query_start: list[int], kv_lens: list[int], block_table: Tensor, shape: Shape,
                 window: int) -> list[Chunk]:  # fmt: skip
    """The chunks of a step for layers of one window (0: all keys)."""
    table = block_table.numpy()
    chunks = []
    for size, tiles in _cut(query_start, kv_lens):
        low = np.maximum(tiles.position - window + 1, 0) // SPAN if window else np.zeros_like(tiles.position)
        high = (tiles.position + tiles.count - 1) // SPAN + 1
        order = np.argsort(high, kind='stable')
        tiles, low, high = tiles.take(order), low[order], high[order]
        step = row_step(shape.head_dim)
        rows = -(-size * (shape.heads // shape.kv_heads) // step) * step
        cost = shape.kv_heads * SPAN * max(rows, shape.head_dim)
        start = 0
        while start < len(order):
            stop = start + 1
            budget = BATCH_FLOATS // cost
            while stop < len(order) and (stop + 1 - start) * min(int(high[stop] - low[start]), OCTET) <= budget:
                stop += 1
            part = slice(start, stop)
            chunks.append(_chunk(size, rows, tiles.take(part), low[part], high[part], table, shape, window))
            start = stop
    return chunks


def row_step(head_dim: int) -> int:
    """The row count of which products over ``head_dim`` channels want a multiple."""
    return ROWS if head_dim <= 128 else 2 * ROWS


def _cut(query_start: list[int], kv_lens: list[int]) -> list[tuple[int, _Tiles]]:
    """The rows' queries as tiles, by size."""
    found: dict[int, list[tuple[int, int, int, int]]] = {size: [] for size in TILES}
    for row, kv_len in enumerate(kv_lens):
        token, stop = query_start[row], query_start[row + 1]
        position = kv_len - (stop - token)
        while token < stop:
            count = min(stop - token, TILES[-1])
            size = next(size for size in TILES if count <= size)
            found[size].append((row, token, count, position))
            token, position = token + count, position + count
    return [(size, _Tiles(*np.array(tiles, dtype=np.int64).T)) for size, tiles in found.items() if tiles]


def _chunk(size: int, rows: int, tiles: _Tiles, low: np.ndarray, high: np.ndarray, table: np.ndarray, shape: Shape,
           window: int) -> Chunk:  # fmt: skip
    offsets = np.arange(size)
    inside = offsets < tiles.count[:, None]
    queries = np.where(inside, tiles.token[:, None] + offsets, tiles.token[:, None])
    tokens = queries[inside]
    in_order = bool(inside.all()) and np.array_equal(tokens, tokens[0] + np.arange(len(tokens)))
    leaves = {}
    for octet in range(int(low.min()) // OCTET, -(-int(high.max()) // OCTET)):
        leaf = _leaf(octet, size, tiles, low, high, table, shape, window)
        if leaf is not None:
            leaves[octet] = leaf
    return Chunk(
        size, len(tiles.row), rows,
        first=int(tokens[0]) if in_order else -1,
        queries=torch.from_numpy(queries.ravel()),
        filled=torch.from_numpy(np.flatnonzero(inside)),
        tokens=torch.from_numpy(tokens),
        root=_tree(leaves),
    )  # fmt: skip


def _tree(leaves: dict[int, Leaf]) -> Node:
    """Join neighbours whose octets differ in the last bit only, then in the last two, and so on."""
    nodes: dict[int, Node] = dict(leaves)
    while len(nodes) > 1:
        joined: dict[int, Node] = {}
        for place, node in sorted(nodes.items()):
            above = place // 2
            joined[above] = (joined[above], node) if above in joined else node
        nodes = joined
    return next(iter(nodes.values()))


def _leaf(octet: int, size: int, tiles: _Tiles, low: np.ndarray, high: np.ndarray, table: np.ndarray, shape: Shape,
          window: int) -> Leaf | None:  # fmt: skip
    first, last = np.maximum(low, octet * OCTET), np.minimum(high, (octet + 1) * OCTET)
    counts = np.maximum(last - first, 0)
    pairs = int(counts.sum())
    if not pairs:
        return None
    tile = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(pairs) - np.repeat(np.cumsum(counts) - counts, counts)
    span = first[tile] + column
    column += first[tile] - octet * OCTET  # the tree over spans starts at the octet
    columns = int(column.max()) + 1
    keys = tiles.position[tile] + tiles.count[tile] - span * SPAN  # keys of the span up to the tile's last query
    width = next((width for width in WIDTHS if keys.max() <= width), SPAN)
    partly = keys - tiles.count[tile] + 1 < width  # the tile's first query does not see the whole width
    if window:
        partly |= tiles.position[tile] + tiles.count[tile] - window > span * SPAN
    if not partly.all():
        order = np.argsort(partly, kind='stable')
        tile, column, span, partly = tile[order], column[order], span[order], partly[order]
    masked = int(partly.sum())
    regular = pairs == len(counts) * columns and np.array_equal(tile * columns + column, np.arange(pairs))
    place = None
    if not regular:
        place = np.full(len(counts) * columns, pairs)
        place[tile * columns + column] = np.arange(pairs)
    return Leaf(
        width,
        tiles=None if np.array_equal(tile, np.arange(len(counts))) else torch.from_numpy(tile),
        spans=torch.from_numpy(span),
        pages=_pages(tiles.row[tile], span, width, table, shape),
        caps=_caps(size, tiles.take(tile[pairs - masked :]), span[pairs - masked :], width, window) if masked else None,
        columns=columns,
        table=None if place is None else torch.from_numpy(place),
    )


def _pages(row: np.ndarray, span: np.ndarray, width: int, table: np.ndarray, shape: Shape) -> Tensor:
    per_block = shape.block_size // PAGE
    page = span[:, None] * (SPAN // PAGE) + np.arange(width // PAGE)
    block = page // per_block
    known = block < table.shape[1]
    block = np.where(known, table[row[:, None], np.where(known, block, 0)], 0).astype(np.int64)
    heads = np.arange(shape.kv_heads)[None, :, None]
    rows = (block[:, None] * shape.kv_heads + heads) * per_block + (page % per_block)[:, None]
    return torch.from_numpy(rows.ravel())


def _caps(size: int, tiles: _Tiles, span: np.ndarray, width: int, window: int) -> Tensor:
    key = (span * SPAN)[:, None, None] + np.arange(width)
    query = tiles.position[:, None, None] + np.arange(size)[:, None]
    hidden = (key > query) | (key <= query - window) if window else key > query
    return torch.from_numpy(np.where(hidden, NEVER, np.float32(np.inf))[:, None, :, None, :])
