"""Products of packed codes of 4 bits with inputs of 8 bits: W4A8, in the integers of the tensor cores.

The weight is packed as for 16-bit inputs (:mod:`lmdeploy.ops.triton.quant_packed`), so that one copy serves both. A
thread of the integer instruction wants its channels in another order, in which inputs are quantised
(``ops.quantize.TURN``). Four codes less their zero points are made in a register at a time: with the highest bit of
every byte set, none borrows from the next. A group of 128 is summed exactly in int32 and scaled in float32; sums start
at the bits of 1.5 * 2^23, so that they are floating-point numbers without a conversion, which would take as long as the
product.

Bound: operations, for more than some 90 rows.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.packed_linear import PackedWeight, packed_codes_linear
from lmdeploy.ops.triton.gemm import finish
from lmdeploy.ops.triton.launch import Workspace, cdiv, gdc_launch_dependents, gdc_wait, next_power_of_2, supports_pdl
from lmdeploy.ops.triton.quant_packed import PackedConfig, beside, scale_of

# two registers of two words each, and four zero points, to four registers of four codes
_SPREAD = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    lop3.b32 a, $4, 0x0f0f0f0f, 0x80808080, 0xea;
    lop3.b32 b, $5, 0x0f0f0f0f, 0x80808080, 0xea;
    shr.u32 c, $4, 4;
    shr.u32 d, $5, 4;
    lop3.b32 c, c, 0x0f0f0f0f, 0x80808080, 0xea;
    lop3.b32 d, d, 0x0f0f0f0f, 0x80808080, 0xea;
    prmt.b32 $0, a, b, 0x6420;
    prmt.b32 $2, a, b, 0x7531;
    prmt.b32 $1, c, d, 0x6420;
    prmt.b32 $3, c, d, 0x7531;
    sub.u32 $0, $0, $6; sub.u32 $1, $1, $6; sub.u32 $2, $2, $6; sub.u32 $3, $3, $6;
    xor.b32 $0, $0, 0x80808080; xor.b32 $1, $1, 0x80808080; xor.b32 $2, $2, 0x80808080; xor.b32 $3, $3, 0x80808080;
}""")


@triton.jit
def _codes(words, zero, ASM: tl.constexpr):
    """The four codes of every word less the zero point, as int8, side by side: ``[rows, 4 * WIDTH]``."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _SPREAD, '=&r,=&r,=&r,=&r,r,r,r', [words, zero], dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True, pack=4)  # fmt: skip
    else:
        w = words.to(tl.int32)
        a = ((w & 15) - zero).to(tl.int8)
        b = ((w >> 4 & 15) - zero).to(tl.int8)
        c = ((w >> 8 & 15) - zero).to(tl.int8)
        d = ((w >> 12 & 15) - zero).to(tl.int8)
    return beside(beside(a, b), beside(c, d))


@triton.constexpr_function
def _parted(signed):
    """Two registers of two words each to two of four codes of 8 bits; ``signed``: they are two's complement already."""
    flip = '' if signed else 'xor.b32 $0, $0, 0x80808080; xor.b32 $1, $1, 0x80808080;'
    return f'{{ prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531; {flip} }}'


@triton.jit
def _bytes(words, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """The two codes of every word as int8, side by side: ``[rows, 2 * WIDTH]``."""
    if ASM:
        a, b = tl.inline_asm_elementwise(_parted(SIGNED), '=&r,=&r,r,r', [words], dtype=(tl.int8, tl.int8),
                                         is_pure=True, pack=4)  # fmt: skip
    else:
        w = words.to(tl.int32) if SIGNED else words.to(tl.int32) ^ 0x8080
        a = (w & 255).to(tl.int8)
        b = (w >> 8 & 255).to(tl.int8)
    return beside(a, b)


@triton.jit(do_not_specialize=['M'])
def _codes_kernel(
    x, x_scales, words, meta, bias, y, parts, arrived, M, N, K, x_stride, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, GROUP: tl.constexpr,
    HALF: tl.constexpr, SPLIT: tl.constexpr,
    GATE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = 32
    BK: tl.constexpr = 512 // BITS
    INTEGERS: tl.constexpr = x.dtype.element_ty == tl.int8
    tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0) // SPLIT % tiles
    part = tl.program_id(0) % SPLIT
    above = tl.program_id(0) // SPLIT // tiles
    blocks = tl.cdiv(K, BK)
    share = tl.cdiv(blocks, SPLIT)
    first = part * share
    steps = tl.minimum(share, blocks - first)
    local = tl.arange(0, BN)
    tokens = tl.arange(0, BM)
    lane = tl.arange(0, W)
    here = words + (tile * (BN // 64)).to(tl.int64) * blocks * (64 * W) + first * (64 * W)
    row = (local % 32 + local // (BN // 2) * 32) * W + local % (BN // 2) // 32 * (blocks * 64 * W)
    w_at = here + row[:, None] + lane[None, :]
    m_at = meta + tl.minimum(tile * BN + local, N - 1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x += above.to(tl.int64) * BM * x_stride
    y += above.to(tl.int64) * BM * y_stride
    left = M - above * BM
    there = (tokens < left)[None, :]
    x_at = x + tokens[None, :] * x_stride + (first * BK + tl.arange(0, BK))[:, None]
    groups = 1 if GROUP == 0 else tl.cdiv(K, GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((BN, BM), tl.int32 if INTEGERS else tl.float32)
    magic = tl.full((BN, BM), 0x4B400000, tl.int32)  # the bits of 1.5 * 2^23, to which small integers are added
    now = tl.load(m_at + (0 if GROUP == 0 else tl.minimum(first * BK // GROUP, groups - 1) * N))
    for step in tl.range(0, steps, num_stages=STAGES):
        k = (first + step) * BK
        w = tl.load(w_at, eviction_policy='evict_first')
        w = tl.reshape(tl.permute(tl.reshape(w, (2, BN // 64, 4, 8, 4, 4, 2)), (1, 2, 0, 3, 5, 4, 6)), (BN, W))
        if EVEN_K:
            b = tl.load(x_at, mask=there, other=0.0)
        else:
            b = tl.load(x_at, mask=there & (tl.arange(0, BK) < K - k)[:, None], other=0.0)
        if BITS == 8:
            a = _bytes(w, SIGNED, ASM)
        else:
            a = _codes(w, tl.broadcast_to((now & 0x7F).to(tl.int8)[:, None], (BN, W)), ASM)
        a = tl.reshape(tl.permute(tl.reshape(a, (BN, BK // 16, 2, 2, 2, 2)), (0, 1, 3, 4, 2, 5)), (BN, BK))
        if not INTEGERS:
            a = a.to(x.dtype.element_ty, bitcast=True)
        if GROUP == 0:
            sums = tl.dot(a, b, sums, out_dtype=sums.dtype)
        else:
            following = tl.load(m_at + tl.minimum((k + BK) // GROUP, groups - 1) * N)
            product = tl.dot(a, b, magic, out_dtype=tl.int32).to(tl.float32, bitcast=True) - 12582912.0
            acc += product * scale_of(now, HALF)[:, None]
            now = following
        w_at += 64 * W
        x_at += BK
    if GROUP == 0:
        acc = sums.to(tl.float32) * scale_of(now, HALF)[:, None]
    acc *= tl.load(x_scales + above * BM + tokens, mask=tokens < left, other=0.0)[None, :]
    if SPLIT > 1:
        parts += above * tiles * SPLIT * (BN * BM)
        arrived += above * tiles
    finish(acc, tile, part, tokens, bias, y, parts, arrived, left, N, y_stride, BM, BN, SPLIT, GATE, HAS_BIAS)


_PARTS = Workspace(torch.float32, 1 << 22)
_ARRIVED = Workspace(torch.int32, 1 << 14)


def packed_codes_gemm(codes: Tensor, scales: Tensor, packed: PackedWeight, config: PackedConfig, out: Tensor,
                      activation: str = '', pdl: bool = True) -> Tensor:  # fmt: skip
    """See :func:`lmdeploy.ops.packed_linear.packed_codes_linear`."""
    m, k = codes.shape
    n = packed.out_features
    tiles, above = cdiv(n, config.block_n), cdiv(m, config.columns)
    parts = arrived = None
    if config.split > 1:
        parts = _PARTS.get(codes.device, tiles * above * config.split * config.block_n * config.columns)
        arrived = _ARRIVED.get(codes.device, tiles * above)
    _codes_kernel[(tiles * above * config.split,)](
        codes, scales, packed.words, packed.meta, packed.bias, out, parts, arrived, m, n, k,
        codes.stride(0), out.stride(0),
        BM=config.columns, BN=config.block_n, BITS=packed.bits,
        SIGNED=bool(packed.float8) or packed.dtype is torch.bfloat16, GROUP=packed.group,
        HALF=packed.scale_dtype is torch.float16,
        SPLIT=config.split, GATE=activation if packed.gated else '', HAS_BIAS=packed.bias is not None,
        EVEN_K=k % (512 // packed.bits) == 0, PDL=pdl, STAGES=config.stages, ASM=codes.device.type != 'cpu',
        num_warps=config.block_n // 16, num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


@lru_cache
def _tuned() -> dict[str, PackedConfig]:
    """The measured configurations, ``'NxK/rows'``."""
    text = (Path(__file__).parents[1] / 'tuned' / 'packed_codes_sm90.json').read_text(encoding='utf-8')
    return {shape: PackedConfig(*values) for shape, values in json.loads(text).items()}


@lru_cache
def choose(n: int, k: int, rows: int) -> PackedConfig:
    """How ``rows``, a power of two, are multiplied."""
    columns = min(128, max(16, rows))
    return _tuned().get(f'{n}x{k}/{rows}') or PackedConfig(128, columns, 1, 4 if columns < 128 else 3)


@packed_codes_linear.impl('cuda', when=lambda case: [] if case.dtype is torch.int8 else ['needs codes of 8 bits'])
def triton_packed_codes_linear(codes: Tensor, scales: Tensor, packed: PackedWeight, activation: str,
                               dtype: torch.dtype) -> Tensor:  # fmt: skip
    m, n = len(codes), packed.out_features
    out = torch.empty(m, n // 2 if packed.gated else n, dtype=dtype, device=codes.device)
    if m:
        config = choose(n, packed.in_features, min(4096, next_power_of_2(m)))
        packed_codes_gemm(codes, scales, packed, config, out, activation, supports_pdl(codes.device))
    return out
