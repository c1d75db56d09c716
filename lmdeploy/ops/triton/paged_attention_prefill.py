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
from triton.tools.tensor_descriptor import TensorDescriptor

from lmdeploy.ops.triton.launch import gdc_launch_dependents, gdc_wait, supports_pdl
from lmdeploy.ops.triton.paged_attention_decode import LOG2E, TILE, load_tile


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Launch parameters: rows of a program's tile, warps, stages of the loop over keys; see ``DecodeConfig``."""

    rows: int
    num_warps: int
    num_stages: int
    tma: bool = True


def config_of(dim: int, size: int) -> PrefillConfig:
    """The launch parameters for heads of ``dim`` channels of ``size`` bytes."""
    if size == 4:
        return PrefillConfig(64 if dim <= 128 else 32, 4, 3)
    return PrefillConfig(64, 4, 5 if dim <= 128 else 3)


@triton.jit
def _row_of(query_start, first_row, rows, program, QUERIES: tl.constexpr):
    """The row whose tiles, ``(queries_i // QUERIES) + 1`` for row i, the program's number falls into."""
    start = tl.load(query_start + first_row)
    low = 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        tiles = (tl.load(query_start + first_row + middle) - start) // QUERIES + middle
        if tiles <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _hide(s, key, position, WINDOW: tl.constexpr):
    """Scores of the keys that the queries see; -inf elsewhere. What lies behind a row's last token is never seen."""
    seen = key[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (key[None, :] > position[:, None] - WINDOW)
    return tl.where(seen, s, float('-inf'))


@triton.jit
def _prefill_kernel(q, k_pages, v_pages, out, block_table, table_rows, query_start, kv_lens, first_row, rows,
                    table_stride, q_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr,
                    D: tl.constexpr, D_P: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
                    WINDOW: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
                    PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    QUERIES: tl.constexpr = M // GROUP
    program = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first: late tiles see more keys
    head = tl.program_id(0)
    i = _row_of(query_start, first_row, rows, program, QUERIES)
    begin = tl.load(query_start + first_row)
    first = tl.load(query_start + first_row + i)
    count = tl.load(query_start + first_row + i + 1) - first
    done = (program - (first - begin) // QUERIES - i) * QUERIES  # queries of the row before this tile
    if done < count:
        length = tl.load(kv_lens + first_row + i)
        table = block_table + tl.load(table_rows + first_row + i).to(tl.int64) * table_stride
        m = tl.arange(0, M)
        d = tl.arange(0, D_P)
        query = done + m // GROUP
        position = length - count + query
        ok = (m < QUERIES * GROUP) & (query < count)
        token = first + query
        column = (head * GROUP + m % GROUP) * D
        inside = ok[:, None] & (d < D)[None, :]
        tile_q = tl.load(q + (token.to(tl.int64) * q_stride + column)[:, None] + d[None, :], mask=inside, other=0.0)
        acc = tl.zeros([M, D_P], tl.float32)
        top = tl.full([M], float('-inf'), tl.float32)
        weight = tl.zeros([M], tl.float32)
        # the tiles [low, high) are looked at; all queries of this tile see all keys of [all_from, all_to)
        at = length - count + done
        last = tl.minimum(at + QUERIES, length)
        high = (last + TILE - 1) // TILE
        all_to = (at + 1) // TILE
        low = 0
        all_from = 0
        if WINDOW > 0:
            low = tl.maximum(at + 1 - WINDOW, 0) // TILE
            all_from = (tl.maximum(last - WINDOW, 0) + TILE - 1) // TILE
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
        result = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(out + (token.to(tl.int64) * (HEADS * GROUP * D) + column)[:, None] + d[None, :],
                 result.to(out.dtype.element_ty), mask=inside)  # fmt: skip


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, table_rows: Tensor,
                      query_start: Tensor, kv_lens: Tensor, first_row: int, rows: int, tokens: int, out: Tensor,
                      scale: float, window: int, config: PrefillConfig | None = None) -> None:  # fmt: skip
    """Causal attention of the rows ``first_row..first_row+rows``, whose queries are the last of their cached tokens.

    Args:
        q: ``[T, heads, D]``, contiguous but for the first dimension.
        k_pages, v_pages: ``[blocks, kv_heads, block_size, D]``, contiguous; block_size is a multiple of 64.
        block_table: ``[N, W] int32``; row i's blocks are in row ``table_rows[i]``.
        query_start, kv_lens, table_rows: ``[B + 1]``, ``[B]`` and ``[B] int32``.
        tokens: upper bound of these rows' queries together.
        out: ``[T, heads, D]``, contiguous; written at the rows' tokens.
        config: None: that of :func:`config_of`.
    """
    heads, dim = q.shape[1:]
    kv_heads, block_size = k_pages.shape[1:3]
    group, padded = heads // kv_heads, triton.next_power_of_2(dim)
    config = config or config_of(dim, q.element_size())
    pdl = supports_pdl(q.device)
    m = max(config.rows, triton.next_power_of_2(group))
    k, v = k_pages, v_pages
    tma = config.tma and dim * q.element_size() % 16 == 0  # what descriptors can describe
    if tma:
        k, v = (TensorDescriptor(plane, [plane.numel() // dim, dim], [dim, 1], [TILE, padded])
                for plane in (k_pages, v_pages))  # fmt: skip
    _prefill_kernel[(kv_heads, tokens // (m // group) + rows)](
        q, k, v, out, block_table, table_rows, query_start, kv_lens, first_row, rows, block_table.stride(0),
        q.stride(0), scale * LOG2E, HEADS=kv_heads, GROUP=group, M=m, D=dim, D_P=padded, BLOCK=block_size, TILE=TILE,
        WINDOW=window, STAGES=config.num_stages, TMA=tma,
        PRECISION='tf32x3' if q.dtype == torch.float32 else 'tf32', PDL=pdl, num_warps=config.num_warps, launch_pdl=pdl,
    )  # fmt: skip
