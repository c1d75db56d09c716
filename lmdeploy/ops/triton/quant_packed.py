"""Products with packed codes: streamed once, unpacked in registers, multiplied in 16 bits.

As in :mod:`lmdeploy.ops.triton.gemm`, operands are swapped, so that rows of the weight are the rows of the matrix
instruction; K is split over programs, and the last program of a tile adds the parts in a fixed order.

The 16 bytes that a thread loads are what it multiplies: the layout of memory is that of the first operand in registers
(:mod:`lmdeploy.ops.packed_linear`), which the compiler follows through reshapes, so that nothing is exchanged between
threads. Two words in a register are unpacked by the same few instructions: a code is put below the exponent of a power
of two, where it counts in units of one, and the power is taken off together with the zero point. A group's scale is
applied to the sum of its products; or, where a program has more sums than weights, to the weights, so that no product
waits for the one before. Zero points and scales of the following step are loaded a step ahead.

Bound: bytes, of which a code takes its bits, and 32 bits a group and channel.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.linear import GATE_GROUP
from lmdeploy.ops.packed_linear import CODES, WIDTH, PackedWeight, packed_linear
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

FOLDING = 64  # columns from which weights are scaled, and rounded, instead of sums: there are fewer of them
MOST_ROWS = 256  # beyond, a dense weight is made for cuBLAS
WIDE = 65536  # output channels of which none is made: that of a head takes a gigabyte
KINDS = {torch.bfloat16: 'bf16', torch.float16: 'f16'}
_BYTES = {  # of float8 in 16 bits: how far to shift up, the magnitude's mask, what makes up for the exponents' bias
    ('float8_e4m3fn', 'bf16'): (4, 0x07F007F0, 0x7B807B80),
    ('float8_e5m2', 'bf16'): (5, 0x0FE00FE0, 0x77807780),
    ('float8_e4m3fn', 'f16'): (7, 0x3F803F80, 0x5C005C00),
    ('float8_e5m2', 'f16'): (8, 0x7F007F00, 0x3C003C00),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedConfig:
    """How a shape is multiplied.

    Attributes:
        block_n: output channels per program, 64 or 128. columns: tokens per program.
        split: programs that share a tile's K. stages: steps that are in flight.
        ahead: bytes of a program's codes that are asked for before the wait.
    """

    block_n: int
    columns: int
    split: int
    stages: int
    ahead: int = 0


@triton.constexpr_function
def _instructions(j, bits, float8, zeros, kind, fold):
    """Two words to two numbers: code ``j`` of each, less the zero point, and scaled where ``fold``."""
    scaled = f'mul.rn.{kind}x2 $0, $0, $3;' if fold else ''
    if float8:
        up, mask, factor = _BYTES[float8, kind]
        shift = up - 8 * j
        move = f'shl.b32 a, $1, {shift};' if shift >= 0 else f'shr.u32 a, $1, {-shift};'
        sign = 'shl.b32 b, $1, 8;' if j == 0 else 'mov.b32 b, $1;'
        return (f'{{ .reg .b32 a, b; {move} {sign} and.b32 b, b, 0x80008000; lop3.b32 a, a, {mask}, b, 0xea; '
                f'mov.b32 b, {factor}; mul.rn.{kind}x2 $0, a, b; {scaled} }}')  # fmt: skip
    if bits == 8 and kind == 'bf16':
        less = 'sub.rn.bf16x2 $0, $0, $2;' if zeros else ''
        return (f'{{ .reg .b32 a, b; shr.u32 b, $1, {8 * j}; lop3.b32 a, b, 0x007f007f, 0x43004300, 0xea; '
                f'lop3.b32 b, b, 0x00800080, 0x43004300, 0xea; sub.rn.bf16x2 $0, a, b; {less} {scaled} }}')  # fmt: skip
    mask = ((1 << bits) - 1) * 0x10001
    magic = 0x43004300 if kind == 'bf16' else 0x64006400
    return (f'{{ .reg .b32 a; shr.u32 a, $1, {j * bits}; lop3.b32 a, a, {mask}, {magic}, 0xea; '
            f'sub.rn.{kind}x2 $0, a, $2; {scaled} }}')  # fmt: skip


@triton.jit
def _code(words, zero, scale, J: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr,
          KIND: tl.constexpr, FOLD: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Code J of ``words [rows, WIDTH] int16`` less ``zero``, exactly, in the type of inputs; times ``scale`` if FOLD.

    ``zero`` and ``scale`` are of the type of inputs and the shape of ``words``.
    """
    if ASM:
        return tl.inline_asm_elementwise(_instructions(J, BITS, FLOAT8, ZEROS, KIND, FOLD), '=&r,r,r,r',
                                         [words, zero, scale], dtype=zero.dtype, is_pure=True, pack=2)  # fmt: skip
    exact = _exact_code(words, zero, J, BITS, FLOAT8, KIND)
    return exact * scale if FOLD else exact


@triton.jit
def _exact_code(words, zero, J: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, KIND: tl.constexpr):
    """The same in the language, for the interpreter."""
    code = (words.to(tl.int32) >> (J * BITS)) & ((1 << BITS) - 1)
    if FLOAT8 == 'float8_e4m3fn':
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(zero.dtype)
    if FLOAT8 == 'float8_e5m2':
        return code.to(tl.uint8).to(tl.float8e5, bitcast=True).to(zero.dtype)
    if BITS == 8 and KIND == 'bf16':
        return (((code ^ 128) - 128).to(tl.float32) - zero.to(tl.float32)).to(zero.dtype)
    return (code.to(tl.float32) + (128.0 if KIND == 'bf16' else 1024.0) - zero.to(tl.float32)).to(zero.dtype)


@triton.jit
def beside(a, b):
    """``[rows, 2 n]`` of two ``[rows, n]``."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _pair(words, zero, scale, FIRST: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr,
          KIND: tl.constexpr, FOLD: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    return beside(_code(words, zero, scale, FIRST, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM),
                   _code(words, zero, scale, FIRST + 1, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM))  # fmt: skip


@triton.jit
def _four(words, zero, scale, FIRST: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr,
          KIND: tl.constexpr, FOLD: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    return beside(_pair(words, zero, scale, FIRST, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM),
                   _pair(words, zero, scale, FIRST + 2, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM))  # fmt: skip


@triton.jit
def _operand(words, zero, scale, FIRST: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr,
             ZEROS: tl.constexpr, KIND: tl.constexpr, FOLD: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Codes FIRST to FIRST + RUN - 1 of all words, side by side: ``[rows, RUN * WIDTH]``."""
    if RUN == 1:
        return _code(words, zero, scale, FIRST, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM)
    elif RUN == 2:
        return _pair(words, zero, scale, FIRST, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM)
    elif RUN == 4:
        return _four(words, zero, scale, FIRST, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM)
    else:
        return beside(_four(words, zero, scale, FIRST, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM),
                       _four(words, zero, scale, FIRST + 4, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM))  # fmt: skip


@triton.jit
def scale_of(meta, HALF: tl.constexpr):
    """The scales in ``meta [rows] int32``: float32."""
    if HALF:
        return (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (meta & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=['M'])
def _packed_kernel(
    x, words, meta, bias, y, parts, arrived, M, N, K, x_stride, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, CODES: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, ZEROS: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr,
    SPLIT: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, AHEAD: tl.constexpr,
    FOLD: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = 32  # words of a row
    BK: tl.constexpr = W * CODES
    DOTS: tl.constexpr = CODES // RUN
    tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0) // SPLIT % tiles
    part = tl.program_id(0) % SPLIT
    above = tl.program_id(0) // SPLIT // tiles  # which BM tokens
    blocks = tl.cdiv(K, BK)
    share = tl.cdiv(blocks, SPLIT)
    first = part * share
    steps = tl.minimum(share, blocks - first)
    local = tl.arange(0, BN)
    tokens = tl.arange(0, BM)
    lane = tl.arange(0, W)
    start = words + (tile * (BN // 64)).to(tl.int64) * blocks * (64 * W)
    here = start + first * (64 * W)
    # the upper half of a program's rows are those that a thread multiplies beside the lower half
    row = (local % 32 + local // (BN // 2) * 32) * W + local % (BN // 2) // 32 * (blocks * 64 * W)
    w_at = here + row[:, None] + lane[None, :]
    m_at = meta + tl.minimum(tile * BN + local, N - 1)
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            piece: tl.constexpr = AHEAD // 64
            begin = tl.minimum(first * (64 * W), blocks * (64 * W) - AHEAD // 2)
            prefetch_l2(start + begin + tl.arange(0, 64) * (piece // 2), piece)
        gdc_wait()
    x += above.to(tl.int64) * BM * x_stride
    y += above.to(tl.int64) * BM * y_stride
    left = M - above * BM
    there = (tokens < left)[None, :]
    x_at = x + tokens[None, :] * x_stride + first * BK
    groups = 1 if GROUP == 0 else tl.cdiv(K, GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    if GROUP == 0:
        now = tl.load(m_at)
    else:
        now = tl.load(m_at + tl.minimum(first * BK // GROUP, groups - 1) * N)
    for step in tl.range(0, steps, num_stages=STAGES):
        k = (first + step) * BK
        w = tl.load(w_at, eviction_policy='evict_first')
        w = tl.reshape(tl.permute(tl.reshape(w, (2, BN // 64, 4, 8, 4, 4, 2)), (1, 2, 0, 3, 5, 4, 6)), (BN, W))
        for dot in tl.static_range(DOTS):
            ks = dot * RUN * W + tl.arange(0, RUN * W)
            if EVEN_K:
                b = tl.load(x_at + ks[:, None], mask=there, other=0.0)
            else:
                b = tl.load(x_at + ks[:, None], mask=there & (ks < K - k)[:, None], other=0.0)
            if GROUP > 0:
                following = tl.load(m_at + tl.minimum((k + (dot + 1) * RUN * W) // GROUP, groups - 1) * N)
            zero = (now & 0xFFFF).to(tl.int16).to(x.dtype.element_ty, bitcast=True)[:, None]
            zero = tl.broadcast_to(zero, (BN, W))
            scale = tl.broadcast_to(scale_of(now, HALF).to(x.dtype.element_ty)[:, None], (BN, W))
            a = _operand(w, zero, scale, dot * RUN, RUN, BITS, FLOAT8, ZEROS, KIND, FOLD, ASM)
            if GROUP == 0 or FOLD:
                acc = tl.dot(a, b, acc)
            else:
                acc += tl.dot(a, b) * scale_of(now, HALF)[:, None]
            if GROUP > 0:
                now = following
        w_at += 64 * W
        x_at += BK
    if GROUP == 0 and not FOLD:
        acc *= scale_of(now, HALF)[:, None]
    if SPLIT > 1:
        parts += above * tiles * SPLIT * (BN * BM)
        arrived += above * tiles
    finish(acc, tile, part, tokens, bias, y, parts, arrived, left, N, y_stride, BM, BN, SPLIT, GATE, HAS_BIAS)


_PARTS = Workspace(torch.float32, 1 << 22)
_ARRIVED = Workspace(torch.int32, 1 << 14)


def packed_gemm(x: Tensor, packed: PackedWeight, config: PackedConfig, activation: str = '', out: Tensor | None = None,
                pdl: bool = True) -> Tensor:  # fmt: skip
    """See :func:`lmdeploy.ops.packed_linear.packed_linear`; ``out`` is of x's type or float32."""
    m, k = x.shape
    n = packed.out_features
    y = torch.empty(m, n // 2 if packed.gated else n, dtype=x.dtype, device=x.device) if out is None else out
    tiles, above = cdiv(n, config.block_n), cdiv(m, config.columns)
    parts = arrived = None
    if config.split > 1:
        parts = _PARTS.get(x.device, tiles * above * config.split * config.block_n * config.columns)
        arrived = _ARRIVED.get(x.device, tiles * above)
    per_word, run = CODES[packed.bits], _run(packed)
    _packed_kernel[(tiles * above * config.split,)](
        x, packed.words, packed.meta, packed.bias, y, parts, arrived, m, n, k, x.stride(0),
        y.stride(0),
        BM=config.columns, BN=config.block_n, CODES=per_word, BITS=packed.bits, FLOAT8=packed.float8,
        GROUP=packed.group, RUN=run, ZEROS=packed.zeros, KIND=KINDS[packed.dtype],
        HALF=packed.scale_dtype is torch.float16, SPLIT=config.split, GATE=activation if packed.gated else '',
        HAS_BIAS=packed.bias is not None, EVEN_K=k % (WIDTH * per_word) == 0,
        AHEAD=min(config.ahead, 4096 * packed.words.shape[1]) if pdl else 0,
        FOLD=packed.group > 0 and config.columns >= FOLDING, PDL=pdl, STAGES=config.stages,
        ASM=x.device.type != 'cpu', num_warps=config.block_n // 16, num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip
    return y


@triton.jit
def _unpack_kernel(
    words, meta, out, N, K,
    CODES: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    ZEROS: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = 32
    BK: tl.constexpr = W * CODES
    blocks = tl.cdiv(K, BK)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    local = tl.arange(0, 64)
    lane = tl.arange(0, W)
    if PDL:
        gdc_launch_dependents()
    w = tl.load(words + tl.program_id(0).to(tl.int64) * (64 * W) + local[:, None] * W + lane[None, :])
    w = tl.reshape(tl.permute(tl.reshape(w, (2, 1, 4, 8, 4, 4, 2)), (1, 2, 0, 3, 5, 4, 6)), (64, W))
    rows = tile * 64 + local
    safe = tl.minimum(rows, N - 1)
    groups = 1 if GROUP == 0 else tl.cdiv(K, GROUP)
    if PDL:
        gdc_wait()
    for dot in tl.static_range(CODES // RUN):
        ks = block * BK + dot * RUN * W + tl.arange(0, RUN * W)
        group = 0 if GROUP == 0 else tl.minimum((block * BK + dot * RUN * W) // GROUP, groups - 1)
        now = tl.load(meta + group * N + safe)
        zero = (now & 0xFFFF).to(tl.int16).to(out.dtype.element_ty, bitcast=True)[:, None]
        zero = tl.broadcast_to(zero, (64, W))
        a = _operand(w, zero, zero, dot * RUN, RUN, BITS, FLOAT8, ZEROS, KIND, False, ASM)
        a = (a.to(tl.float32) * scale_of(now, HALF)[:, None]).to(out.dtype.element_ty)
        at = out + rows[:, None].to(tl.int64) * K + ks[None, :]
        tl.store(at, a, mask=(rows < N)[:, None] & (ks < K)[None, :])


def unpack(packed: PackedWeight, pdl: bool = True) -> Tensor:
    """The dense weight ``[out, in]`` in the type of inputs, in memory of its own."""
    n, k = packed.out_features, packed.in_features
    out = torch.empty(n, k, dtype=packed.dtype, device=packed.words.device)
    tiles, blocks = packed.words.shape[:2]
    _unpack_kernel[(tiles * blocks,)](
        packed.words, packed.meta, out, n, k,
        CODES=CODES[packed.bits], BITS=packed.bits, FLOAT8=packed.float8, GROUP=packed.group, RUN=_run(packed),
        ZEROS=packed.zeros, KIND=KINDS[packed.dtype], HALF=packed.scale_dtype is torch.float16, PDL=pdl,
        ASM=out.device.type != 'cpu', num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _run(packed: PackedWeight) -> int:
    """Codes of a word whose products are added before they are scaled: those within a group."""
    per_word = CODES[packed.bits]
    if per_word & per_word - 1:
        return 1
    return gcd(per_word, packed.group // WIDTH) if packed.group else per_word


@lru_cache
def _tuned() -> dict[str, PackedConfig]:
    """The measured configurations, ``'bits/NxK/rows'``, rows a power of two."""
    text = (Path(__file__).parents[1] / 'tuned' / 'packed_sm90.json').read_text(encoding='utf-8')
    return {shape: PackedConfig(*values) for shape, values in json.loads(text).items()}


@lru_cache
def choose(device: torch.device, bits: int, n: int, k: int, rows: int) -> PackedConfig | None:
    """How ``[rows, k] @ [k, n]`` is multiplied; None: dequantised first, by cuBLAS."""
    if rows > MOST_ROWS and n < WIDE:
        return None
    bucket = max(16, next_power_of_2(rows))
    shape = f'{bits}/{n}x{k}/{bucket}'
    tuned = _tuned()
    return tuned[shape] if shape in tuned else default(bits, n, k, bucket, multiprocessors(device))


def default(bits: int, n: int, k: int, rows: int, processors: int) -> PackedConfig:
    """A configuration for a shape that was not measured: what was best, or nearly, for those that were."""
    tiles, steps = cdiv(n, 64), cdiv(k, WIDTH * CODES[bits])
    if rows > 64:
        wide = n >= 16384
        if rows > 128 and wide and CODES[bits] <= 4:
            return PackedConfig(128, 256, 1, 3)
        return PackedConfig(64, 128 if wide or rows > 128 else 64, 1, 3)
    split, most = 1, 8 if rows < 64 else 4
    while split < most and 2 * tiles * split < 9 * processors and steps >= 4 * split:
        split *= 2
    if rows < 64:
        return PackedConfig(64, rows, split, 3, 4096)
    wide = n >= 16384
    return PackedConfig(128 if wide else 64, rows, 1 if wide else split, 4)


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype in KINDS else ['needs a 16-bit type']


@packed_linear.impl('cuda', when=_refuse)
def triton_packed_linear(x: Tensor, packed: PackedWeight, activation: str, exact: bool) -> Tensor:
    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, x.shape[-1])
    n, pdl = packed.out_features, supports_pdl(x.device)
    config = choose(x.device, packed.bits, n, packed.in_features, len(rows)) if len(rows) else None
    if config is not None:
        width = n // 2 if packed.gated else n
        out = torch.empty(len(rows), width, dtype=torch.float32 if exact else x.dtype, device=x.device)
        return packed_gemm(rows, packed, config, activation, out, pdl)
    weight, bias = unpack(packed, pdl), packed.bias
    if exact:
        product = torch.mm(rows, weight.t(), out_dtype=torch.float32)
        return product if bias is None else product.add_(bias)
    y = F.linear(rows, weight, bias)
    return gate_mul(y, activation, GATE_GROUP) if packed.gated else y
