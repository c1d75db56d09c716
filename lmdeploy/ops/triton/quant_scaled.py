"""Products of codes of 8 bits on the tensor cores: int8 sums in int32, float8 in float32; scales follow the sum.

Few rows: operands are swapped and K is split, as in :mod:`lmdeploy.ops.triton.gemm`. Many rows: tiles of 128 by 256 and
their like, both operands copied by the tensor memory accelerator, programs that go on to the next tile.

Bound: bytes of the weight for few rows, operations for many.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmdeploy.ops.linear import GATE_GROUP
from lmdeploy.ops.scaled_linear import ScaledWeight, scaled_linear
from lmdeploy.ops.table import OpCase
from lmdeploy.ops.triton.activation import gate_mul
from lmdeploy.ops.triton.gemm import finish
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

MOST_FEW = 64
CUBLAS_ROWS = 512  # of float8 with one scale a token and a channel


@dataclass(frozen=True, slots=True)
class FewConfig:
    """Few rows: see :class:`lmdeploy.ops.triton.gemm.GemmConfig`. ``ahead``: bytes of a weight's row."""

    block_n: int
    block_k: int
    split: int
    warps: int
    stages: int
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class ManyConfig:
    """Many rows: the tile, and how many tiles lie beside each other in the order of programs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    beside: int = 8


SMALL = ManyConfig(64, 128, 128, 4, 4)  # whose result fits shared memory in float32, too


@triton.jit(do_not_specialize=['M'])
def _few_kernel(
    x, x_scales, w, w_scales, bias, y, parts, arrived, M, N, K, x_stride, xs_stride, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, X_GROUPS: tl.constexpr,
    INTEGERS: tl.constexpr, SPLIT: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
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
            prefetch_l2(w + safe_rows.to(tl.int64) * K + tl.minimum(first, K - AHEAD), AHEAD)
    w_scale = tl.load(w_scales + safe_rows) if GROUP == 0 else tl.zeros((BN,), tl.float32)
    if PDL:
        gdc_wait()
    there = (tokens < M)[None, :]
    w_at = w + safe_rows.to(tl.int64)[:, None] * K + ks[None, :]
    x_at = x + tokens[None, :] * x_stride + ks[:, None]
    sums = tl.zeros((BN, BM), tl.int32 if INTEGERS else tl.float32)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(w_at, eviction_policy='evict_first')
            b = tl.load(x_at, mask=there, other=0.0)
        else:
            left = K - first - step * BK
            inside = tl.arange(0, BK) < left
            a = tl.load(w_at, mask=inside[None, :], other=0.0, eviction_policy='evict_first')
            b = tl.load(x_at, mask=there & inside[:, None], other=0.0)
        if GROUP == 0:
            sums = tl.dot(a, b, sums, out_dtype=sums.dtype)
        else:
            group = (first + step * BK) // GROUP
            product = tl.dot(a, b, out_dtype=sums.dtype).to(tl.float32)
            product *= tl.load(w_scales + group * N + safe_rows)[:, None]
            if X_GROUPS:
                product *= tl.load(x_scales + tokens * xs_stride + group, mask=tokens < M, other=0.0)[None, :]
            acc += product
        w_at += BK
        x_at += BK
    if GROUP == 0:
        acc = sums.to(tl.float32) * w_scale[:, None]
    if not X_GROUPS:
        acc *= tl.load(x_scales + tokens * xs_stride, mask=tokens < M, other=0.0)[None, :]
    finish(acc, tile, part, tokens, bias, y, parts, arrived, M, N, y_stride, BM, BN, SPLIT, GATE, HAS_BIAS)


@triton.jit(do_not_specialize=['M'])
def _many_kernel(
    x, x_scales, w, w_scales, bias, y, M, N, K, xs_stride, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, X_GROUPS: tl.constexpr,
    INTEGERS: tl.constexpr, BESIDE: tl.constexpr, HAS_BIAS: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        band = tile // (BESIDE * across)  # BESIDE tiles of tokens share what they read of the weight
        height = tl.minimum(down - band * BESIDE, BESIDE)
        row = band * BESIDE + tile % (BESIDE * across) % height
        column = tile % (BESIDE * across) // height
        tokens = row * BM + tl.arange(0, BM)
        channels = column * BN + tl.arange(0, BN)
        sums = tl.zeros((BM, BN), tl.int32 if INTEGERS else tl.float32)
        acc = tl.zeros((BM, BN), tl.float32)
        for step in tl.range(0, steps, num_stages=STAGES):
            a = x.load([row * BM, step * BK])
            b = w.load([column * BN, step * BK]).T
            if GROUP == 0:
                sums = tl.dot(a, b, sums, out_dtype=sums.dtype)
            else:
                group = step * BK // GROUP
                product = tl.dot(a, b, out_dtype=sums.dtype).to(tl.float32)
                product *= tl.load(w_scales + group * N + channels, mask=channels < N, other=0.0)[None, :]
                if X_GROUPS:
                    product *= tl.load(x_scales + tokens * xs_stride + group, mask=tokens < M, other=0.0)[:, None]
                acc += product
        if GROUP == 0:
            acc = sums.to(tl.float32) * tl.load(w_scales + channels, mask=channels < N, other=0.0)[None, :]
        if not X_GROUPS:
            acc *= tl.load(x_scales + tokens * xs_stride, mask=tokens < M, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias + channels, mask=channels < N, other=0.0).to(tl.float32)[None, :]
        at = y + tokens[:, None].to(tl.int64) * y_stride + channels[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=(tokens < M)[:, None] & (channels < N)[None, :])


_PARTS = Workspace(torch.float32, 1 << 22)
_ARRIVED = Workspace(torch.int32, 1 << 14)


def few_gemm(codes: Tensor, scales: Tensor, weight: ScaledWeight, config: FewConfig, out: Tensor, activation: str = '',
             pdl: bool = True) -> Tensor:  # fmt: skip
    """See :func:`lmdeploy.ops.scaled_linear.scaled_linear`, for as many rows as a matrix instruction has columns.

    ``config.block_k`` is a group where the weight has groups. ``out``: ``[T, out]``, or half of it where gated.
    """
    m, k = codes.shape
    n = len(weight.codes)
    columns = max(16, next_power_of_2(m))
    tiles = cdiv(n, config.block_n)
    parts = arrived = None
    if config.split > 1:
        parts = _PARTS.get(codes.device, tiles * config.split * config.block_n * columns)
        arrived = _ARRIVED.get(codes.device, tiles)
    _few_kernel[(tiles * config.split,)](
        codes, scales, weight.codes, weight.scales, weight.bias, out, parts, arrived, m, n, k, codes.stride(0),
        scales.stride(0), out.stride(0),
        BM=columns, BN=config.block_n, BK=config.block_k, GROUP=weight.group, X_GROUPS=scales.shape[1] > 1,
        INTEGERS=codes.dtype is torch.int8, SPLIT=config.split, GATE=activation if weight.gated else '',
        HAS_BIAS=weight.bias is not None, EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0,
        AHEAD=min(config.ahead, k // 16 * 16) if pdl else 0, PDL=pdl, STAGES=config.stages, num_warps=config.warps,
        num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


def many_gemm(codes: Tensor, scales: Tensor, weight: ScaledWeight, config: ManyConfig, out: Tensor,
              pdl: bool = True) -> Tensor:  # fmt: skip
    """As :func:`few_gemm`, for many rows and without an activation: ``out [T, out]``."""
    m, k = codes.shape
    n = len(weight.codes)
    x_map = TensorDescriptor.from_tensor(codes, [config.block_m, config.block_k])
    w_map = TensorDescriptor.from_tensor(weight.codes, [config.block_n, config.block_k])
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    programs = min(multiprocessors(codes.device), tiles) if codes.device.type != 'cpu' else 1
    _many_kernel[(programs,)](
        x_map, scales, w_map, weight.scales, weight.bias, out, m, n, k, scales.stride(0), out.stride(0),
        BM=config.block_m, BN=config.block_n, BK=config.block_k, GROUP=weight.group, X_GROUPS=scales.shape[1] > 1,
        INTEGERS=codes.dtype is torch.int8, BESIDE=config.beside, HAS_BIAS=weight.bias is not None,
        PROGRAMS=multiprocessors(codes.device), PDL=pdl, STAGES=config.stages, num_warps=config.warps,
        num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


@lru_cache
def _tuned() -> dict[str, tuple[int, ...]]:
    """The measured configurations, ``'kind/NxK/rows'``: the fields of FewConfig, or of ManyConfig above MOST_FEW."""
    text = (Path(__file__).parents[1] / 'tuned' / 'scaled_sm90.json').read_text(encoding='utf-8')
    return {shape: tuple(values) for shape, values in json.loads(text).items()}


@lru_cache
def choose_few(device: torch.device, kind: str, n: int, k: int, rows: int) -> FewConfig:
    """How few rows are multiplied; ``kind``: 'int8', 'float8', or 'groups'."""
    columns = max(16, next_power_of_2(rows))
    shape = f'{kind}/{n}x{k}/{columns}'
    if shape in _tuned():
        return FewConfig(*_tuned()[shape])
    tiles, split = cdiv(n, 64), 1
    while split < 8 and tiles * split < 2 * multiprocessors(device) and k >= 512 * split:
        split *= 2
    return FewConfig(64, 128, split, 4, 6 if columns < 64 else 4)


@lru_cache
def choose_many(kind: str, n: int, k: int, rows: int) -> ManyConfig:
    """How many rows are multiplied; ``rows`` a power of two."""
    shape = f'{kind}/{n}x{k}/{rows}'
    if shape in _tuned():
        return ManyConfig(*_tuned()[shape])
    if kind == 'groups':
        return ManyConfig(128, 128, 128, 8, 4)
    return ManyConfig(128, 256, 128, 8, 3) if rows * n >= 256 * 16384 else SMALL


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2) else ['needs codes of 8 bits']


@scaled_linear.impl('cuda', when=_refuse)
def triton_scaled_linear(codes: Tensor, scales: Tensor, weight: ScaledWeight, activation: str,
                         dtype: torch.dtype) -> Tensor:  # fmt: skip
    m, (n, k) = len(codes), weight.codes.shape
    pdl = supports_pdl(codes.device)
    kind = 'groups' if weight.group else 'int8' if codes.dtype is torch.int8 else 'float8'
    if m <= MOST_FEW:
        out = torch.empty(m, n // 2 if weight.gated else n, dtype=dtype, device=codes.device)
        if m:
            few_gemm(codes, scales, weight, choose_few(codes.device, kind, n, k, m), out, activation, pdl)
        return out
    whole = codes.dtype is torch.float8_e4m3fn and not weight.group and not n % 16
    if whole and m >= CUBLAS_ROWS and dtype is torch.bfloat16:
        out = torch._scaled_mm(codes, weight.codes.t(), scale_a=scales.contiguous(), scale_b=weight.scales,
                               out_dtype=dtype, use_fast_accum=True)  # fmt: skip
        out = out if weight.bias is None else out.add_(weight.bias)
        return gate_mul(out, activation, GATE_GROUP) if weight.gated else out
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    config = choose_many(kind, n, k, min(4096, next_power_of_2(m))) if dtype.itemsize == 2 else SMALL
    many_gemm(codes, scales, weight, config, out, pdl)
    return gate_mul(out, activation, GATE_GROUP) if weight.gated else out
