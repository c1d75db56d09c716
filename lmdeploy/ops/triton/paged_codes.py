"""The inner loop of attention over pages of codes, for decode rows and prompts alike.

Codes become numbers of the queries' type exactly, without scale and zero: those of a key go into its score
(``q . (s c + z) = s (q . c) + z sum(q)``), those of a value into its weight. In bfloat16 a code becomes a number by a
few logical operations: an integer below 128 in the lower bits of 0x4300 is that integer plus 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.kv_codes import KeyOffset
from lmdeploy.ops.triton.kv_codes import words
from lmdeploy.ops.triton.launch import next_power_of_2

TILE = 64  # keys per tile: a page, or a part of a longer one


@dataclass(frozen=True, slots=True)
class Pages:
    """A layer's pages as kernels take them; what there is not is None.

    Attributes:
        k, v: planes, or descriptors of tiles of them, with ``tma``.
        bits: of a code; 0: they hold numbers.
        k_scales, v_scales: ``[blocks, kv_heads, block_size] int32``: words of a scale and a zero.
        within, back: of the keys' offset, see :class:`KeyOffset`; ``rotated`` is their number of channels that turn.
    """

    k: Tensor | TensorDescriptor
    v: Tensor | TensorDescriptor
    tma: bool
    bits: int
    k_scales: Tensor | None
    v_scales: Tensor | None
    within: Tensor | None
    back: Tensor | None
    rotated: int

    @classmethod
    def of(cls, layer: KVLayer, dim: int, tma: bool, offset: KeyOffset | None, longest: int) -> Pages:
        """``layer``, whose heads have ``dim`` channels, for contexts of up to ``longest`` tokens."""
        width = layer.k.shape[-1]
        tma = tma and width * layer.k.element_size() % 16 == 0  # what descriptors can describe
        k, v, back = layer.k, layer.v, None
        if tma:
            box = [TILE, next_power_of_2(width)]
            k, v = (TensorDescriptor(pages, [pages.numel() // width, width], [width, 1], box) for pages in (k, v))
        k_scales, v_scales = (None, None) if layer.k_scales is None else map(words, layer.scales)
        if offset is not None:
            back = offset.turns.back(TILE, -(-longest // TILE))
        return cls(k, v, tma, 0 if k_scales is None else 8 * width // dim, k_scales, v_scales,
                   None if offset is None else offset.within, back, 0 if back is None else back.shape[-1])


@triton.jit
def load_codes(pages, at, COLUMNS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr):
    """``[TILE, PADDED] int8`` from row ``at`` of a plane seen as ``[rows, COLUMNS]``."""
    if TMA:
        tile = pages.load([at, 0])
    else:
        j = tl.arange(0, PADDED)
        place = pages + at.to(tl.int64) * COLUMNS + tl.arange(0, TILE)[:, None] * COLUMNS + j[None, :]
        if PADDED == COLUMNS:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(j < COLUMNS)[None, :], other=0)
    return tile


@triton.jit
def load_scales(scales, at):
    """Scale and zero, float32, of the words at ``at``."""
    word = tl.load(scales + at)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def widen(codes, KIND: tl.constexpr, ASM: tl.constexpr, DIRECT: tl.constexpr):
    """Codes of 8 bits as numbers of type KIND: the lower seven bits as an integer, less 128 where the eighth is set."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, a, b, minus;
            mov.b32 minus, 0xbf80bf80;
            prmt.b32 low, $2, 0x43434343, 0x4140;
            prmt.b32 high, $2, 0x43434343, 0x4342;
            and.b32 a, low, 0xff7fff7f;
            and.b32 b, low, 0xff80ff80;
            fma.rn.bf16x2 $0, b, minus, a;
            and.b32 a, high, 0xff7fff7f;
            and.b32 b, high, 0xff80ff80;
            fma.rn.bf16x2 $1, b, minus, a;
            }
            """, '=r,=r,r', [codes], dtype=tl.bfloat16, is_pure=DIRECT, pack=4)  # fmt: skip
    else:
        return codes.to(KIND)


@triton.jit
def widen_halves(codes, KIND: tl.constexpr, ASM: tl.constexpr, DIRECT: tl.constexpr):
    """The lower and the upper halves of bytes of two codes, plus 128 with ASM: numbers of type KIND."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, up;
            shr.b32 up, $4, 4;
            prmt.b32 t, $4, 0x43434343, 0x4140;
            and.b32 $0, t, 0xff0fff0f;
            prmt.b32 t, $4, 0x43434343, 0x4342;
            and.b32 $1, t, 0xff0fff0f;
            prmt.b32 t, up, 0x43434343, 0x4140;
            and.b32 $2, t, 0xff0fff0f;
            prmt.b32 t, up, 0x43434343, 0x4342;
            and.b32 $3, t, 0xff0fff0f;
            }
            """, '=r,=r,=r,=r,r', [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=DIRECT, pack=4)  # fmt: skip
    else:
        return (codes & 15).to(KIND), ((codes >> 4) & 15).to(KIND)


@triton.jit
def load_queries(base, rows, columns, inside, D: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr):
    """The queries at ``base + rows``, their second halves for codes of 4 bits, and the sums over channels.

    ``columns`` are the first PADDED channels, ``inside [M, PADDED]`` those that there are. For codes of 8 bits the
    second result is the first one.
    """
    q = tl.load(base + rows[:, None] + columns[None, :], mask=inside, other=0.0)
    upper = q
    total = tl.sum(q.to(tl.float32), 1)
    if BITS == 4:
        upper = tl.load(base + rows[:, None] + D // 2 + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(upper.to(tl.float32), 1)
    return q, upper, total


@triton.jit
def load_plain(base, rows, there, D: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr):
    """The queries as they meet an offset, ``[M, PADDED] float32``, and with each channel its partner of the rotation.

    Zeros where there is no offset, which is to say that nothing turns.
    """
    M: tl.constexpr = rows.shape[0]
    plain = tl.zeros([M, PADDED], tl.float32)
    other = tl.zeros([M, PADDED], tl.float32)
    if R > 0:
        d = tl.arange(0, PADDED)
        partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
        plain = tl.load(base + rows[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        other = tl.load(base + rows[:, None] + partner[None, :], mask=there[:, None] & (d < R)[None, :], other=0.0)
    return plain.to(tl.float32), other.to(tl.float32)


@triton.jit
def attend_codes(q, upper, total, plain, other, position, low, high, all_from, all_to, k_pages, v_pages, k_scales,
                 v_scales, table, head, within, back, scale, HEADS: tl.constexpr, D: tl.constexpr,
                 PADDED: tl.constexpr, D_P: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
                 WINDOW: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, BITS: tl.constexpr,
                 OFFSET: tl.constexpr, ASM: tl.constexpr, DIRECT_K: tl.constexpr, DIRECT_V: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Walk over the tiles [low, high) of keys of one head.

    Args:
        q, upper, total: see :func:`load_queries`.
        plain, other: with OFFSET: the queries as they meet the offset, ``[M, D_P] float32``, and with each channel its
            partner of the rotation.
        position: ``[M] int32``: the last key that a query sees.
        all_from, all_to: the tiles between are seen whole by all queries.
        within: ``[HEADS, 256, D] float32`` and back ``[tiles, 2, R] float32``: see ``KeyOffset``, ``Turns``.
        scale: factor of the scores, times log2(e).

    Returns:
        Sums of weighted values ``[M, PADDED]``, their second halves for codes of 4 bits, the largest scores (base 2)
        and the sums of weights ``[M]``.
    """
    M: tl.constexpr = q.shape[0]
    COLUMNS: tl.constexpr = D * BITS // 8
    n = tl.arange(0, TILE)
    acc = tl.zeros([M, PADDED], tl.float32)
    acc_upper = tl.zeros([M, PADDED], tl.float32)
    top = tl.full([M], float('-inf'), tl.float32)
    weights = tl.zeros([M, TILE], tl.float32)  # summed over keys once, at the end
    zeros = tl.zeros([M, TILE], tl.float32)
    SHIFT: tl.constexpr = 0 if BITS == 8 else (136 if ASM else 8)  # what is too much in a number of 4 bits
    if OFFSET:
        d = tl.arange(0, D_P)
        offsets = tl.load(within + head * (256 * D) + n[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    for tile in tl.range(low, high, num_stages=STAGES):
        block = tl.load(table + tile * TILE // BLOCK)
        place = (block * HEADS + head) * BLOCK + tile * TILE % BLOCK
        k = load_codes(k_pages, place, COLUMNS, PADDED, TILE, TMA)
        k_scale, k_zero = load_scales(k_scales, place + n)
        if BITS == 8:
            s = tl.dot(q, tl.trans(widen(k, q.dtype, ASM, DIRECT_K)), input_precision=PRECISION)
        else:
            k_lower, k_upper = widen_halves(k, q.dtype, ASM, DIRECT_K)
            s = tl.dot(q, tl.trans(k_lower), input_precision=PRECISION)
            s = tl.dot(upper, tl.trans(k_upper), s, input_precision=PRECISION)
            k_zero -= SHIFT * k_scale
        s = s * (k_scale * scale)[None, :] + total[:, None] * (k_zero * scale)[None, :]
        if OFFSET:
            turn = back + tile * (2 * R) + d
            c = tl.load(turn, mask=d < R, other=1.0)
            si = tl.load(turn + R, mask=d < R, other=0.0)
            turned = plain * c[None, :] + other * si[None, :]
            s += tl.dot(turned, tl.trans(offsets), input_precision=PRECISION) * scale
        if (tile >= all_to) | (tile < all_from):
            key = tile * TILE + n
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float('-inf'))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float('-inf'), 0.0, new)  # a query that has seen no key yet
        old_scale = tl.exp2(top - base)
        e = tl.exp2(s - base[:, None])
        v_scale, v_zero = load_scales(v_scales, place + n)
        v = load_codes(v_pages, place, COLUMNS, PADDED, TILE, TMA)
        p = (e * v_scale[None, :]).to(q.dtype)
        weights = weights * old_scale[:, None] + e
        zeros = zeros * old_scale[:, None] + e * v_zero[None, :]
        acc = acc * old_scale[:, None]
        if BITS == 8:
            acc = tl.dot(p, widen(v, q.dtype, ASM, DIRECT_V), acc, input_precision=PRECISION)
        else:
            zeros -= SHIFT * p.to(tl.float32)
            v_lower, v_upper = widen_halves(v, q.dtype, ASM, DIRECT_V)
            acc = tl.dot(p, v_lower, acc, input_precision=PRECISION)
            acc_upper = tl.dot(p, v_upper, acc_upper * old_scale[:, None], input_precision=PRECISION)
        top = new
    zero = tl.sum(zeros, 1)[:, None]
    return acc + zero, acc_upper + zero, top, tl.sum(weights, 1)
