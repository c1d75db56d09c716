"""Dense linear for few rows: the weight is streamed once, at the rate of the memory.

Operands are swapped: rows of the weight are the rows of the matrix instruction (64 at least), the tokens its columns
(8 at least), so that one token wastes little. K is split over programs so that every multiprocessor streams; the last
program of a tile adds the partial sums in a fixed order, so that results do not depend on who comes last.

Before it waits for the kernel in front of it, a program asks the second-level cache for the beginning of its part of
the weight: the memory stays busy while the kernel before drains and whatever small kernel lies between runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmdeploy.ops.linear import GATE_GROUP, gated_linear, linear, linear_float
from lmdeploy.ops.table import OpCase
from lmdeploy.ops.triton.activation import gate_mul, gated
from lmdeploy.ops.triton.launch import (
    Workspace,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    multiprocessors,
    next_power_of_2,
    prefetch_l2,
    supports_pdl,
)

MOST_ROWS = 64


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


@triton.jit(do_not_specialize=['M'])
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
    finish(acc, tile, part, tokens, bias, y, parts, arrived, M, N, y_stride, BM, BN, SPLIT, GATE, HAS_BIAS)


@triton.jit
def finish(acc, tile, part, tokens, bias, y, parts, arrived, M, N, y_stride, BM: tl.constexpr, BN: tl.constexpr,
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
        x: ``[M, K]`` of a 16-bit type, M <= MOST_ROWS, K a multiple of 8, rows of consecutive elements.
        weight: ``[N, K]``, contiguous; interleaved where gated.
        out: ``[M, N]``, or ``[M, N / 2]`` where gated, of x's type or float32.

    Returns:
        ``out``, or a new tensor of x's type.
    """
    m, k = x.shape
    n = weight.shape[0]
    y = torch.empty(m, n // 2 if gate else n, dtype=x.dtype, device=x.device) if out is None else out
    bm = _columns(m)
    tiles = cdiv(n, config.block_n)
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


def _columns(rows: int) -> int:
    """Columns of the matrix instruction for so many rows of x."""
    return max(16, next_power_of_2(rows))


@lru_cache
def _tuned() -> dict[str, GemmConfig | None]:
    """The measured configurations by shape, ``'NxK/columns'``; None: cuBLAS was faster."""
    text = (Path(__file__).parents[1] / 'tuned' / 'gemm_sm90.json').read_text(encoding='utf-8')
    return {shape: None if values is None else GemmConfig(*values) for shape, values in json.loads(text).items()}


@lru_cache
def choose(device: torch.device, n: int, k: int, rows: int) -> GemmConfig | None:
    """How ``[rows, k] @ [k, n]`` is multiplied on ``device``; None: by cuBLAS."""
    if rows > MOST_ROWS or k % 8 or not supports_pdl(device):
        return None
    columns = _columns(rows)
    shape = f'{n}x{k}/{columns}'
    tuned = _tuned()
    return tuned[shape] if shape in tuned else default(n, k, columns, multiprocessors(device))


def default(n: int, k: int, columns: int, processors: int) -> GemmConfig:
    """A configuration for a shape that was not measured: what was best, or nearly, for those that were."""
    if n >= 16384:
        return GemmConfig(64, 128, 1, 4, 4 if columns < 64 else 3, min(256, k // 8 * 8))
    tiles, most = cdiv(n, 64), 4 if columns < 64 else 2
    split = 1
    while split < most and tiles * split < 2 * processors and k >= 512 * split:
        split *= 2
    return GemmConfig(64, 128, split, 4, 4, 0) if columns < 64 else GemmConfig(64, 64, split, 4, 8, 0)


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype in (torch.bfloat16, torch.float16) else ['needs a 16-bit type']


def _config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    if x.ndim != 2 or not len(x) or x.stride(1) != 1 or not weight.is_contiguous():
        return None
    return choose(x.device, weight.shape[0], weight.shape[1], len(x))


@linear.impl('cuda', when=_refuse)
def triton_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    config = _config(x, weight)
    return F.linear(x, weight, bias) if config is None else small_gemm(x, weight, bias, config)


@linear_float.impl('cuda', when=_refuse)
def triton_linear_float(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    config = _config(x, weight)
    if config is not None:
        out = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
        return small_gemm(x, weight, bias, config, out=out)
    product = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32).view(*x.shape[:-1], -1)
    return product if bias is None else product.add_(bias)


@gated_linear.impl('cuda', when=_refuse)
def triton_gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    config = _config(x, weight)
    if config is None:
        return gate_mul(F.linear(x, weight, bias), activation, GATE_GROUP)
    return small_gemm(x, weight, bias, config, activation)
