"""Attention of rows with any number of queries over the paged cache: prompts, chunks of prompts behind cached tokens.

One program takes a tile of M rows of one kv head: ``M // group`` consecutive queries times the ``group`` query heads
that share its keys, so that a short chunk fills the tensor cores as well as a long one. It walks over the keys that
its queries see (Dao 2023, FlashAttention-2), with a mask where some of them do not see all of a tile. The grid depends
on the numbers of tokens and rows only; which row a program works for is found on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.kv_codes import KeyOffset
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, next_power_of_2, supports_pdl
from lmdeploy.ops.triton.paged_attention_decode import LOG2E, load_tile
from lmdeploy.ops.triton.paged_codes import TILE, Pages, attend_codes, padded_words, store_pieces


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Launch parameters: rows of a program's tile, warps, stages of the loop over keys; see ``DecodeConfig``."""

    rows: int
    num_warps: int
    num_stages: int
    tma: bool = True


def config_of(dim: int, size: int, bits: int = 0, offset: bool = False) -> PrefillConfig:
    """The launch parameters for heads of ``dim`` channels of ``size`` bytes, as measured on an H200, or of codes.

    Codes are unpacked once for all rows of a tile; an ``offset`` of the keys takes registers that wide heads need.
    """
    if bits:
        return PrefillConfig(64 if offset or dim > 128 else 128, 8, 3)
    if size == 4:
        return PrefillConfig(64 if dim <= 128 else 32, 4, 3)
    return PrefillConfig(64, 4, 5) if dim <= 128 else PrefillConfig(128, 8, 3)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Where the programs of a step begin, on the device; all layers share it.

    Attributes:
        tiles: ``[4, N] int32``, per tile of queries: its first token, how many queries it has (none: 0 or less), the
            first one's position, and its row of the block table.
    """

    tiles: Tensor
    config: PrefillConfig


@triton.jit(do_not_specialize=('first_row', 'rows', 'tiles'),
            do_not_specialize_on_alignment=('query_start', 'kv_lens', 'table_rows'))
def _plan_kernel(query_start, kv_lens, table_rows, out, first_row, rows, tiles, QUERIES: tl.constexpr,
                 TILES: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Row i has ``queries_i // QUERIES + 1`` tiles, the last perhaps without queries: a bound that needs no sum."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    begin = tl.load(query_start + first_row)
    row = tl.full([TILES], -1, tl.int32)
    for i0 in range(0, rows, ROWS):
        i = i0 + tl.arange(0, ROWS)
        start = (tl.load(query_start + first_row + i, mask=i < rows, other=0) - begin) // QUERIES + i
        row += tl.sum(((start[None, :] <= tile[:, None]) & (i < rows)[None, :]).to(tl.int32), 1)
    first = tl.load(query_start + first_row + row)
    count = tl.load(query_start + first_row + row + 1) - first
    done = (tile - (first - begin) // QUERIES - row) * QUERIES  # queries of the row before this tile
    ok = tile < tiles
    tl.store(out + tile, first + done, mask=ok)
    tl.store(out + tiles + tile, tl.minimum(count - done, QUERIES), mask=ok)
    tl.store(out + 2 * tiles + tile, tl.load(kv_lens + first_row + row) - count + done, mask=ok)
    tl.store(out + 3 * tiles + tile, tl.load(table_rows + first_row + row), mask=ok)


@triton.jit
def _hide(s, key, position, WINDOW: tl.constexpr):
    """Scores of the keys that the queries see; -inf elsewhere. What lies behind a row's last token is never seen."""
    seen = key[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (key[None, :] > position[:, None] - WINDOW)
    return tl.where(seen, s, float('-inf'))


@triton.jit
def _prefill_kernel(q, q_plain, k_pages, v_pages, k_scales, v_scales, within, back, out, block_table, tiles,
                    table_stride, q_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr,
                    D: tl.constexpr, D_P: tl.constexpr, WORDS_P: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
                    TILE: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
                    BITS: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    number = tl.num_programs(1)
    mine = tiles + number - 1 - tl.program_id(1)  # the longest first: late tiles see more keys
    first = tl.load(mine)
    count = tl.load(mine + number)
    at = tl.load(mine + 2 * number)
    table_row = tl.load(mine + 3 * number)
    if count > 0:
        table = block_table + table_row.to(tl.int64) * table_stride
        m = tl.arange(0, M)
        d = tl.arange(0, D_P)
        query = m // GROUP
        position = at + query
        ok = query < count
        token = first + query
        column = (head * GROUP + m % GROUP) * D
        inside = ok[:, None] & (d < D)[None, :]
        q_rows = token.to(tl.int64) * q_stride + column
        # the tiles [low, high) are looked at; all queries of this tile see all keys of [all_from, all_to)
        last = at + count
        high = (last + TILE - 1) // TILE
        all_to = (at + 1) // TILE
        low = 0
        all_from = 0
        if WINDOW > 0:
            low = tl.maximum(at + 1 - WINDOW, 0) // TILE
            all_from = (tl.maximum(last - WINDOW, 0) + TILE - 1) // TILE
        if BITS > 0:
            acc, acc1, acc2, acc3, top, weight = attend_codes(
                q, q_plain, q_rows, ok, position, low, high, all_from, all_to, k_pages, v_pages, k_scales, v_scales,
                table, head, within, back, scale, M, HEADS, D, WORDS_P, D_P, R, BLOCK, TILE, WINDOW, STAGES, TMA, BITS,
                ASM, PRECISION)  # fmt: skip
        else:
            tile_q = tl.load(q + q_rows[:, None] + d[None, :], mask=inside, other=0.0)
            acc = tl.zeros([M, D_P], tl.float32)
            top = tl.full([M], float('-inf'), tl.float32)
            weight = tl.zeros([M], tl.float32)
            n = tl.arange(0, TILE)
            for tile in tl.range(low, high, num_stages=STAGES):
                block = tl.load(table + tile * TILE // BLOCK)
                place = (block * HEADS + head) * BLOCK + tile * TILE % BLOCK
                k = load_tile(k_pages, place, D, D_P, TILE, TMA)
                s = tl.dot(tile_q, tl.trans(k), input_precision=PRECISION)
                if (tile >= all_to) | (tile < all_from):
                    s = _hide(s, tile * TILE + n, position, WINDOW)
                new = tl.maximum(top, tl.max(s, 1) * scale)
                base = tl.where(new == float('-inf'), 0.0, new)  # a query that has seen no key yet
                old_scale = tl.exp2(top - base)
                e = tl.exp2(s * scale - base[:, None])
                weight = weight * old_scale + tl.sum(e, 1)
                acc = acc * old_scale[:, None]
                v = load_tile(v_pages, place, D, D_P, TILE, TMA)
                acc = tl.dot(e.to(v.dtype), v, acc, input_precision=PRECISION)
                top = new
        whole = tl.where(weight == 0.0, 1.0, weight)[:, None]
        out_rows = token.to(tl.int64) * (HEADS * GROUP * D) + column
        if BITS > 0:
            store_pieces(out, out_rows, ok, acc / whole, acc1 / whole, acc2 / whole, acc3 / whole, WORDS_P, D, BITS)
        else:
            tl.store(out + out_rows[:, None] + d[None, :], (acc / whole).to(out.dtype.element_ty), mask=inside)


def plan_prefill(query_start: Tensor, kv_lens: Tensor, table_rows: Tensor, first_row: int, rows: int, tokens: int,
                 group: int, config: PrefillConfig) -> PrefillPlan:  # fmt: skip
    """Cut the rows ``first_row..first_row+rows`` into tiles, on the device.

    Args:
        query_start, kv_lens, table_rows: ``[B + 1]``, ``[B]`` and ``[B] int32``: row i's queries are the last of its
            ``kv_lens[i]`` tokens, and its blocks are in row ``table_rows[i]`` of the block table.
        tokens: upper bound of these rows' queries together.
        group: query heads per key head.
    """
    queries, pdl = config.rows // group, supports_pdl(kv_lens.device)
    number = tokens // queries + rows
    tiles = torch.empty(4, number, dtype=torch.int32, device=kv_lens.device)
    _plan_kernel[(cdiv(number, 64),)](
        query_start, kv_lens, table_rows, tiles, first_row, rows, number, QUERIES=queries, TILES=64, ROWS=64, PDL=pdl,
        num_warps=4, launch_pdl=pdl)  # fmt: skip
    return PrefillPlan(tiles, config)


def prefill_attention(q: Tensor, layer: KVLayer, block_table: Tensor, plan: PrefillPlan, out: Tensor, scale: float,
                      window: int, plain: Tensor | None = None, offset: KeyOffset | None = None) -> None:  # fmt: skip
    """Causal attention of the rows of ``plan``.

    Args:
        q: ``[T, heads, D]``, contiguous but for the first dimension; as it meets the codes, if the pages hold such.
        layer: pages ``[blocks, kv_heads, block_size, D]``, contiguous; block_size is a multiple of 64.
        block_table: ``[N, W] int32``.
        out: ``[T, heads, D]``, contiguous; written at the rows' tokens.
        plain: the queries as they meet ``offset``, which is off the keys; of q's strides.
    """
    heads, dim = q.shape[1:]
    kv_heads, block_size = layer.k.shape[1:3]
    group, padded = heads // kv_heads, max(next_power_of_2(dim), 16)  # the least that products take
    config, pdl = plan.config, supports_pdl(q.device)
    pages = Pages.of(layer, dim, config.tma, offset, block_table.shape[1] * block_size)
    _prefill_kernel[(kv_heads, plan.tiles.shape[1])](
        q, plain, pages.k, pages.v, pages.k_scales, pages.v_scales, pages.within, pages.back, out, block_table,
        plan.tiles, block_table.stride(0), q.stride(0), scale * LOG2E, HEADS=kv_heads, GROUP=group, M=config.rows,
        D=dim, D_P=padded, WORDS_P=padded_words(dim, pages.bits), R=pages.rotated, BLOCK=block_size, TILE=TILE,
        WINDOW=window, STAGES=config.num_stages, TMA=pages.tma, BITS=pages.bits, ASM=q.dtype == torch.bfloat16,
        PRECISION='tf32x3' if q.dtype == torch.float32 else 'tf32', PDL=pdl, num_warps=config.num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
