"""Dense linear for few rows: the weight is streamed once, at the rate of the memory.

Operands are swapped: rows of the weight are the rows of the matrix instruction (64 at least), the tokens its columns
(8 at least), so that one token wastes little. K is split over programs so that every multiprocessor streams; the last
program of a tile adds the partial sums in a fixed order, so that results do not depend on who comes last.

Before it waits for the kernel in front of it, a program asks the second-level cache for the beginning of its part of
the weight: the memory stays busy while the kernel before drains and whatever small kernel lies between runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmdeploy.ops.triton.activation import gated
from lmdeploy.ops.triton.launch import Workspace, gdc_launch_dependents, gdc_wait, prefetch_l2

GATE_GROUP = 8  # gated weights: 8 rows of the gate, then 8 of up, and so on


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """How a shape is multiplied.

    Attributes:
        block_n: rows of the weight per program. block_k: elements of K per step.
        split: programs that share a tile's K. warps, stages: as triton names them.
        ahead: elements of K per weight row that are asked for before the wait.
    """

    block_n: int
    block_k: int
    split: int
    warps: int
    stages: int
    ahead: int = 512
    tma: bool = False


@triton.jit
def _gemm_kernel(
    x, w, w_map, bias, y, parts, arrived, M, N, K, x_stride, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    share = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    steps = tl.minimum(share, tl.cdiv(K, BK) - part * share)
    first = part * share * BK
    rows = tile * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BM)
    ks = first + tl.arange(0, BK)
    safe_rows = rows if EVEN_N else tl.minimum(rows, N - 1)
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            prefetch_l2(w + safe_rows.to(tl.int64) * K + tl.minimum(first, K - AHEAD), AHEAD * 2)
        gdc_wait()
    w_at = w + safe_rows.to(tl.int64)[:, None] * K + ks[None, :]
    x_at = x + tokens[None, :] * x_stride + ks[:, None]
    there = (tokens < M)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        if TMA:
            a = w_map.load([tile * BN, first + step * BK])
            b = tl.load(x_at, mask=there & (ks < K - step * BK)[:, None], other=0.0)
        elif EVEN_K:
            a = tl.load(w_at, eviction_policy='evict_first')
            b = tl.load(x_at, mask=there, other=0.0)
        else:
            left = K - step * BK
            a = tl.load(w_at, mask=(ks < left)[None, :], other=0.0, eviction_policy='evict_first')
            b = tl.load(x_at, mask=there & (ks < left)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
        w_at += BK
        x_at += BK
    _finish(acc, tile, part, tokens, bias, y, parts, arrived, M, N, y_stride, BM, BN, SPLIT, GATE, HAS_BIAS)


@triton.jit
def _finish(acc, tile, part, tokens, bias, y, parts, arrived, M, N, y_stride, BM: tl.constexpr, BN: tl.constexpr,
            SPLIT: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Add up a tile's parts (the program that comes last does) and store it."""
    if SPLIT == 1:
        _store(acc, tile, tokens, bias, y, M, N, y_stride, BM, BN, GATE, HAS_BIAS)
    else:
        at = tl.arange(0, BN)[:, None] + tokens[None, :] * BN
        mine = parts + (tile * SPLIT + part) * (BN * BM)
        there = (tokens < M)[None, :]
        tl.store(mine + at, acc, mask=there)
        tl.debug_barrier()  # all of this program's stores come before the count
        if tl.atomic_add(arrived + tile, 1, sem='acq_rel') == SPLIT - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for i in tl.static_range(SPLIT):
                theirs = parts + (tile * SPLIT + i) * (BN * BM)
                total += tl.load(theirs + at, mask=there, other=0.0, cache_modifier='.cg')
            _store(total, tile, tokens, bias, y, M, N, y_stride, BM, BN, GATE, HAS_BIAS)
            tl.store(arrived + tile, 0)


@triton.jit
def _store(acc, tile, tokens, bias, y, M, N, y_stride, BM: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr,
           HAS_BIAS: tl.constexpr):  # fmt: skip
    if HAS_BIAS:
        rows = tile * BN + tl.arange(0, BN)
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    if GATE == '':
        rows = tile * BN + tl.arange(0, BN)
        at = y + tokens[None, :].to(tl.int64) * y_stride + rows[:, None]
        tl.store(at, acc.to(y.dtype.element_ty), mask=(tokens < M)[None, :] & (rows < N)[:, None])
    else:
        pairs = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        gate = tl.reshape(gate, (BN // 2, BM))
        up = tl.reshape(up, (BN // 2, BM))
        out = gated(gate, up, GATE)
        rows = tile * (BN // 2) + tl.arange(0, BN // 2)
        at = y + tokens[None, :].to(tl.int64) * y_stride + rows[:, None]
        tl.store(at, out.to(y.dtype.element_ty), mask=(tokens < M)[None, :] & (rows < N // 2)[:, None])


_PARTS = Workspace(torch.float32, 1 << 22)
_ARRIVED = Workspace(torch.int32, 1 << 14)


def small_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemmConfig, gate: str = '',
               pdl: bool = True, out: Tensor | None = None) -> Tensor:  # fmt: skip
    """``x @ weight.T + bias`` for few rows, and the gated activation where ``gate`` names one.

    Args:
        x: ``[M, K]`` of a 16-bit type, M <= 64. weight: ``[N, K]``, contiguous; interleaved by GATE_GROUP where gated.

    Returns:
        ``[M, N]``, or ``[M, N / 2]`` where gated.
    """
    m, k = x.shape
    n = weight.shape[0]
    width = n // 2 if gate else n
    y = torch.empty(m, width, dtype=x.dtype, device=x.device) if out is None else out
    bm = max(16, triton.next_power_of_2(m))
    tiles = triton.cdiv(n, config.block_n)
    parts = arrived = None
    if config.split > 1:
        parts = _PARTS.get(x.device, tiles * config.split * config.block_n * bm)
        arrived = _ARRIVED.get(x.device, tiles)
    ahead = min(config.ahead, k)
    w_map = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]) if config.tma else None
    _gemm_kernel[(tiles * config.split,)](
        x, weight, w_map, bias, y, parts, arrived, m, n, k, x.stride(0), y.stride(0),
        BM=bm, BN=config.block_n, BK=config.block_k, SPLIT=config.split, GATE=gate, HAS_BIAS=bias is not None,
        EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0, AHEAD=ahead, PDL=pdl,
        STAGES=config.stages, TMA=config.tma, num_warps=config.warps, num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip
    return y
