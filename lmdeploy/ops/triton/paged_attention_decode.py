"""Decode attention over the paged cache: one query per row, the keys shared out among a fixed number of programs.

All (row, kv head, tile of keys) triples of a step, in this order, form one line of tiles. Program p of G takes the p-th
of G equal stretches of it, whatever the lengths of the rows are, so the grid depends on the device only and a captured
graph serves every context length ("stream-K", Osama et al. 2023, on the split softmax of Dao et al.'s flash decoding).
A stretch may begin or end inside a (row, head): such parts go to a workspace, at most two per program, and the program
that delivers the last part of a (row, head) merges them.

The query heads of one kv head are the rows of one matrix product, padded to 16, the tensor cores' least.

:func:`plan_decode` says once per step where each stretch begins; all layers of a window share it.
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
from lmdeploy.ops.triton.paged_codes import TILE, Pages, attend_codes, padded_words, store_pieces

LOG2E = 1.4426950408889634
MOST_PER_SM = 4  # programs per multiprocessor


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Launch parameters.

    Attributes:
        per_sm: programs per multiprocessor.
        num_stages: a tile's address is a load too, so 2 n + 1 stages hold n tiles of keys and n of values.
        fused: the program that delivers the last part merges the parts; otherwise a second kernel does, in parallel.
        tma: tiles are read by tensor descriptors, not by pointers.
        least: tiles that a program takes at least.
        registers: that a thread may use at most; None: as many as it likes.
    """

    per_sm: int
    num_stages: int
    fused: bool
    tma: bool = True
    least: int = 1
    num_warps: int = 4
    registers: int | None = None


def config_of(dim: int, size: int, pairs: int, bits: int = 0) -> DecodeConfig:
    """The launch parameters for ``pairs`` (row, key head) whose keys have ``dim`` channels of ``size`` bytes, or codes.

    As measured on an H200: few pairs are split into many parts, which a second kernel merges faster; many pairs fill
    the device, and pointers read whole tiles a little faster than descriptors.
    """
    if bits:
        if pairs < 128:
            return DecodeConfig(1 if pairs < 32 else 2, 5, False)
        return DecodeConfig(3, 5 if bits == 8 else 3, True, tma=bits == 4, registers=168)
    if 2 * TILE * next_power_of_2(dim) * size > 32 * 1024:  # a tile of keys and one of values
        return DecodeConfig(1, 5 if dim * size <= 512 else 3, pairs >= 128)
    if dim <= 64:
        if pairs < 128:
            return DecodeConfig(1 if pairs < 32 else 4, 3, False)
        return DecodeConfig(2, 5, True, tma=False)
    if pairs < 128:
        return DecodeConfig(1, 5, False) if pairs < 32 else DecodeConfig(2, 5, False, least=2)
    return DecodeConfig(2, 3, True) if pairs < 512 else DecodeConfig(2, 5, True, tma=dim != 128)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A step's division of work for one window, on the device.

    Attributes:
        stretches: ``[9, G] int32``, per program: the row, key head and tile within them that it begins with; its first
            tile on the line and the one behind its last; that row's length, row of the block table and query token; the
            last program that has a part of the (row, head) that begins in this stretch and ends in another, or -1.
        merged: ``[G] int32``: query token * key heads + key head of that (row, head).
        shares: ``[2] int32``: the first ``shares[1]`` stretches have ``shares[0] + 1`` tiles, the others one less.
    """

    stretches: Tensor
    merged: Tensor
    shares: Tensor
    config: DecodeConfig

    @property
    def programs(self) -> int:
        return self.stretches.shape[1]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Parts of split (row, head) pairs: two per program. ``counts`` is all zeros between launches."""

    sums: Tensor  # [2 G, group, D] float32
    stats: Tensor  # [2 G, 2, group] float32: running maxima (base 2) and sums of weights
    counts: Tensor  # [G] int32: parts delivered of the pair that is split first by program p


def make_workspace(programs: int, group: int, dim: int, device: torch.device) -> Workspace:
    """Memory for ``programs`` programs; it can be shared by all launches of one stream."""
    return Workspace(
        torch.empty(2 * programs, group, dim, dtype=torch.float32, device=device),
        torch.empty(2 * programs, 2, group, dtype=torch.float32, device=device),
        torch.zeros(programs, dtype=torch.int32, device=device),
    )


@triton.jit
def _first_of(p, base, extra):
    """Where program p's stretch begins."""
    return p * base + tl.minimum(p, extra)


@triton.jit
def _owner_of(tile, base, extra):
    """Whose stretch a tile lies in."""
    long = extra * (base + 1)
    return tl.where(tile < long, tile // (base + 1), extra + (tile - long) // tl.maximum(base, 1))


@triton.jit
def _locate(at, first, count, end, HEADS: tl.constexpr):
    """(row, head, tile of the pair, tiles of the pair) of the places ``at`` on the line; behind its end a row too many.

    ``first``, ``count`` and ``end`` are the rows' tiles of one head: those before, their own, and both.
    """
    row = tl.sum((end[None, :] * HEADS <= at[:, None]).to(tl.int32), 1)
    here = row[:, None] == tl.arange(0, first.shape[0])[None, :]
    inside = at - tl.sum(tl.where(here, first[None, :], 0), 1) * HEADS
    tiles = tl.maximum(tl.sum(tl.where(here, count[None, :], 0), 1), 1)
    return row, inside // tiles, inside % tiles, tiles


@triton.jit(do_not_specialize=('rows',), do_not_specialize_on_alignment=('kv_lens', 'query_start', 'table_rows'))
def _plan_kernel(kv_lens, query_start, table_rows, stretches, merged, shares, rows, programs, HEADS: tl.constexpr,
                 WINDOW: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
                 LEAST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.arange(0, ROWS)
    length = tl.load(kv_lens + i, mask=i < rows, other=0)
    count = (length + TILE - 1) // TILE
    if WINDOW > 0:
        count -= tl.maximum(length - WINDOW, 0) // TILE
    end = tl.cumsum(count, 0)
    first = end - count
    total = tl.sum(count, 0) * HEADS
    used = tl.maximum(tl.minimum(programs, total // LEAST), 1)  # the others' stretches lie behind the end of the line
    base, extra = total // used, total % used
    if tl.program_id(0) == 0:
        tl.store(shares, base)
        tl.store(shares + 1, extra)
    p = tl.program_id(0) * PROGRAMS + tl.arange(0, PROGRAMS)
    ok = p < programs
    at = tl.minimum(_first_of(p, base, extra), total)
    behind = tl.minimum(_first_of(p + 1, base, extra), total)
    row, head, tile, tiles = _locate(at, first, count, end, HEADS)
    there = ok & (row < rows)
    out = stretches + p
    tl.store(out, row, mask=ok)
    tl.store(out + programs, head, mask=ok)
    tl.store(out + 2 * programs, tile, mask=ok)
    tl.store(out + 3 * programs, at, mask=ok)
    tl.store(out + 4 * programs, behind, mask=ok)
    tl.store(out + 5 * programs, tl.load(kv_lens + row, mask=there, other=0), mask=ok)
    tl.store(out + 6 * programs, tl.load(table_rows + row, mask=there, other=0), mask=ok)
    tl.store(out + 7 * programs, tl.load(query_start + row, mask=there, other=0), mask=ok)
    row, head, tile, tiles = _locate(behind, first, count, end, HEADS)
    split = ok & (row < rows) & (tile > 0) & (behind - tile >= at)
    last = tl.where(split, _owner_of(behind - tile + tiles - 1, base, extra), -1)
    tl.store(out + 8 * programs, last, mask=ok)
    tl.store(merged + p, tl.load(query_start + row, mask=split, other=0) * HEADS + head, mask=ok)


@triton.jit
def _merge(out_row, sums, stats, first, last, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """Add up the parts of one (row, head), delivered by programs first..last, and store ``[GROUP, D]``.

    All heads lie side by side, so that no sum crosses threads but that over a chunk of parts.
    """
    for e0 in range(0, GROUP * D, WIDTH):
        e = e0 + tl.arange(0, WIDTH)
        inside = e < GROUP * D
        top = tl.full([WIDTH], float('-inf'), tl.float32)
        weight = tl.zeros([WIDTH], tl.float32)
        acc = tl.zeros([WIDTH], tl.float32)
        for p0 in range(first, last + 1, CHUNK):
            p = p0 + tl.arange(0, CHUNK)
            slot = 2 * p + (p == first).to(tl.int32)
            ok = (p <= last)[:, None] & inside[None, :]
            stat = stats + slot[:, None] * (2 * GROUP) + (e // D)[None, :]
            part_top = tl.load(stat, mask=ok, other=float('-inf'), cache_modifier='.cg')
            part_weight = tl.load(stat + GROUP, mask=ok, other=0.0, cache_modifier='.cg')
            part = tl.load(sums + slot[:, None] * (GROUP * D) + e[None, :], mask=ok, other=0.0, cache_modifier='.cg')
            new = tl.maximum(top, tl.max(part_top, 0))
            base = tl.where(new == float('-inf'), 0.0, new)
            old_scale = tl.exp2(top - base)
            scale = tl.exp2(part_top - base[None, :])
            weight = weight * old_scale + tl.sum(part_weight * scale, 0)
            acc = acc * old_scale + tl.sum(part * scale, 0)
            top = new
        tl.store(out_row + e, (acc / tl.where(inside, weight, 1.0)).to(out_row.dtype.element_ty), mask=inside)


@triton.jit
def load_tile(pages, at, D: tl.constexpr, D_P: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr):
    """``[TILE, D_P]`` from row ``at`` of a plane seen as ``[rows, D]``."""
    if TMA:
        tile = pages.load([at, 0])
    else:
        d = tl.arange(0, D_P)
        place = pages + at.to(tl.int64) * D + tl.arange(0, TILE)[:, None] * D + d[None, :]
        if D_P == D:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(d < D)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize_on_alignment=('table_rows', 'query_start', 'kv_lens', 'shares'))
def _decode_kernel(q, q_plain, k_pages, v_pages, k_scales, v_scales, within, back, out, block_table, table_rows,
                   query_start, kv_lens, stretches, shares, sums, stats, counts, table_stride, q_stride, scale,
                   HEADS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
                   WORDS_P: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
                   WINDOW: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, BITS: tl.constexpr,
                   ASM: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
                   CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    row = tl.load(stretches + p)
    head = tl.load(stretches + programs + p)
    skip = tl.load(stretches + 2 * programs + p)
    begin = tl.load(stretches + 3 * programs + p)
    end = tl.load(stretches + 4 * programs + p)
    length = tl.load(stretches + 5 * programs + p)
    table_row = tl.load(stretches + 6 * programs + p)
    token = tl.load(stretches + 7 * programs + p)
    base, extra = tl.load(shares), tl.load(shares + 1)
    m = tl.arange(0, M)
    n = tl.arange(0, TILE)
    d = tl.arange(0, D_P)
    inside = (m < GROUP)[:, None] & (d < D)[None, :]
    at = begin
    while at < end:
        table = block_table + table_row.to(tl.int64) * table_stride
        seen = 0
        if WINDOW > 0:
            seen = tl.maximum(length - WINDOW, 0)
        tile_0 = seen // TILE
        count = (length + TILE - 1) // TILE - tile_0
        take = tl.minimum(count - skip, end - at)
        q_rows = token.to(tl.int64) * q_stride + head * (GROUP * D) + m * D
        if BITS > 0:
            all_from = tile_0 + (seen % TILE > 0).to(tl.int32)
            acc, acc1, acc2, acc3, top, weight = attend_codes(
                q, q_plain, q_rows, m < GROUP, tl.zeros([M], tl.int32) + length - 1, tile_0 + skip,
                tile_0 + skip + take, all_from, length // TILE, k_pages, v_pages, k_scales, v_scales, table, head,
                within, back, scale, M, HEADS, D, WORDS_P, D_P, R, BLOCK, TILE, WINDOW, STAGES, TMA, BITS, ASM,
                PRECISION)  # fmt: skip
        else:
            queries = tl.load(q + q_rows[:, None] + d[None, :], mask=inside, other=0.0)
            acc = tl.zeros([M, D_P], tl.float32)
            top = tl.full([M], float('-inf'), tl.float32)
            weight = tl.zeros([M], tl.float32)
            for tile in tl.range(tile_0 + skip, tile_0 + skip + take, num_stages=STAGES):
                block = tl.load(table + tile * TILE // BLOCK)
                place = (block * HEADS + head) * BLOCK + tile * TILE % BLOCK
                k = load_tile(k_pages, place, D, D_P, TILE, TMA)
                key = tile * TILE + n
                hidden = key >= length
                if WINDOW > 0:
                    hidden = hidden | (key < seen)
                s = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * scale
                s = tl.where(hidden[None, :], float('-inf'), s)
                new = tl.maximum(top, tl.max(s, 1))
                e = tl.exp2(s - new[:, None])
                old_scale = tl.exp2(top - new)
                weight = weight * old_scale + tl.sum(e, 1)
                acc = acc * old_scale[:, None]
                v = load_tile(v_pages, place, D, D_P, TILE, TMA)
                acc = tl.dot(e.to(v.dtype), v, acc, input_precision=PRECISION)
                top = new
        out_row = out + (token.to(tl.int64) * HEADS + head) * (GROUP * D)
        if take == count:
            if BITS > 0:
                whole = weight[:, None]
                store_pieces(out_row, m * D, m < GROUP, acc / whole, acc1 / whole, acc2 / whole, acc3 / whole, WORDS_P,
                             D, BITS)  # fmt: skip
            else:
                tl.store(out_row + m[:, None] * D + d[None, :], (acc / weight[:, None]).to(out.dtype.element_ty),
                         mask=inside)  # fmt: skip
        else:
            pair = at - skip  # the first tile of this (row, head) on the line
            slot = 2 * p + (pair >= begin).to(tl.int32)
            part = sums + slot * (GROUP * D)
            if BITS > 0:
                store_pieces(part, m * D, m < GROUP, acc, acc1, acc2, acc3, WORDS_P, D, BITS)
            else:
                tl.store(part + m[:, None] * D + d[None, :], acc, mask=inside)
            stat = stats + slot * (2 * GROUP)
            tl.store(stat + m, top, mask=m < GROUP)
            tl.store(stat + GROUP + m, weight, mask=m < GROUP)
            if FUSED:
                first = _owner_of(pair, base, extra)
                last = _owner_of(pair + count - 1, base, extra)
                tl.debug_barrier()  # all of the part is stored before one thread says so
                done = tl.atomic_add(counts + first, 1, sem='acq_rel')
                if done == last - first:
                    _merge(out_row, sums, stats, first, last, GROUP, D, WIDTH, CHUNK)
                    tl.store(counts + first, 0)
        at += take
        skip = 0
        head += 1
        if head == HEADS:
            head = 0
            row += 1
            if at < end:
                length = tl.load(kv_lens + row)
                while length == 0:
                    row += 1
                    length = tl.load(kv_lens + row)
                table_row = tl.load(table_rows + row)
                token = tl.load(query_start + row)


@triton.jit(do_not_specialize_on_alignment=('merged',))
def _merge_kernel(out, stretches, merged, sums, stats, GROUP: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
                  CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program (p, g): query head g of the (row, head) that begins in stretch p and ends in a later one, if any."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    p, g = tl.program_id(0), tl.program_id(1)
    last = tl.load(stretches + 8 * tl.num_programs(0) + p)
    place = tl.load(merged + p).to(tl.int64)
    if last > p:
        d = tl.arange(0, D_P)
        top = float('-inf')
        weight = 0.0
        acc = tl.zeros([D_P], tl.float32)
        for p0 in range(p, last + 1, CHUNK):
            part = p0 + tl.arange(0, CHUNK)
            slot = 2 * part + (part == p).to(tl.int32)
            ok = part <= last
            stat = stats + slot * (2 * GROUP) + g
            part_top = tl.load(stat, mask=ok, other=float('-inf'))
            part_weight = tl.load(stat + GROUP, mask=ok, other=0.0)
            sum_ = tl.load(sums + (slot * GROUP + g)[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :],
                           other=0.0)  # fmt: skip
            new = tl.maximum(top, tl.max(part_top, 0))  # a part has a key that is seen
            old_scale = tl.exp2(top - new)
            scale = tl.exp2(part_top - new)
            weight = weight * old_scale + tl.sum(part_weight * scale, 0)
            acc = acc * old_scale + tl.sum(sum_ * scale[:, None], 0)
            top = new
        tl.store(out + (place * GROUP + g) * D + d, (acc / weight).to(out.dtype.element_ty),
                 mask=d < D)  # fmt: skip


def plan_decode(kv_lens: Tensor, query_start: Tensor, table_rows: Tensor, kv_heads: int, window: int, programs: int,
                config: DecodeConfig) -> DecodePlan:  # fmt: skip
    """Share out the tiles of rows with ``kv_lens [B] int32`` among ``programs`` programs, on the device.

    ``query_start`` and ``table_rows`` are those of :func:`decode_attention`.
    """
    rows, pdl = kv_lens.shape[0], supports_pdl(kv_lens.device)
    plan = torch.empty(10 * programs + 2, dtype=torch.int32, device=kv_lens.device)
    stretches, merged, shares = plan[: 9 * programs].view(9, programs), plan[9 * programs : -2], plan[-2:]
    padded = max(next_power_of_2(rows), 16)
    each = max(4096 // padded, 4)
    _plan_kernel[(cdiv(programs, each),)](
        kv_lens, query_start, table_rows, stretches, merged, shares, rows, programs, HEADS=kv_heads, WINDOW=window,
        TILE=TILE, ROWS=padded, PROGRAMS=each, LEAST=config.least, PDL=pdl, num_warps=4, launch_pdl=pdl)  # fmt: skip
    return DecodePlan(stretches, merged, shares, config)


def decode_attention(q: Tensor, layer: KVLayer, block_table: Tensor, table_rows: Tensor, query_start: Tensor,
                     kv_lens: Tensor, plan: DecodePlan, workspace: Workspace, out: Tensor, scale: float, window: int,
                     plain: Tensor | None = None, offset: KeyOffset | None = None) -> None:  # fmt: skip
    """Attention of rows with one query each: token ``query_start[i]`` is the last of row i's ``kv_lens[i]`` tokens.

    Args:
        q: ``[T, heads, D]``, contiguous but for the first dimension; as it meets the codes, if the pages hold such.
        layer: pages ``[blocks, kv_heads, block_size, D]``, contiguous; block_size is a multiple of 64.
        block_table: ``[N, W] int32``; row i's blocks are in row ``table_rows[i]``.
        query_start, kv_lens, table_rows: ``[B] int32`` or longer; a row of length 0 is left alone.
        plan: that of these rows and this window.
        out: ``[T, heads, D]``, contiguous; written at the rows' tokens.
        plain: the queries as they meet ``offset``, which is off the keys; of q's strides.
    """
    heads, dim = q.shape[1:]
    kv_heads, block_size = layer.k.shape[1:3]
    group, padded = heads // kv_heads, max(next_power_of_2(dim), 16)  # the least that products take
    config, pdl = plan.config, supports_pdl(q.device)
    pages = Pages.of(layer, dim, config.tma, offset, block_table.shape[1] * block_size)
    merged = min(next_power_of_2(group * dim), 2048)
    _decode_kernel[(plan.programs,)](
        q, plain, pages.k, pages.v, pages.k_scales, pages.v_scales, pages.within, pages.back, out, block_table,
        table_rows, query_start, kv_lens, plan.stretches, plan.shares, workspace.sums, workspace.stats,
        workspace.counts, block_table.stride(0), q.stride(0), scale * LOG2E, HEADS=kv_heads, GROUP=group,
        M=max(next_power_of_2(group), 16), D=dim, D_P=padded, WORDS_P=padded_words(dim, pages.bits),
        R=pages.rotated, BLOCK=block_size, TILE=TILE, WINDOW=window, STAGES=config.num_stages, TMA=pages.tma,
        BITS=pages.bits, ASM=q.dtype == torch.bfloat16, FUSED=config.fused,
        PRECISION='tf32x3' if q.dtype == torch.float32 else 'tf32', WIDTH=merged, CHUNK=max(2048 // merged, 2),
        PDL=pdl, num_warps=config.num_warps, maxnreg=config.registers, launch_pdl=pdl,
    )  # fmt: skip
    if not config.fused:
        _merge_kernel[(plan.programs, group)](
            out, plan.stretches, plan.merged, workspace.sums, workspace.stats, GROUP=group, D=dim, D_P=padded,
            CHUNK=min(max(4096 // padded, 1), 32), PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
