"""The inner loop of attention over pages of codes, for decode rows and prompts alike.

Codes become numbers of the queries' type exactly, without scale and zero: those of a key go into its score
(``q . (s c + z) = s (q . c) + z sum(q)``), those of a value into its weight.

Pages are read as words of 16 bits, the size of an operand of the tensor cores, so that words lie in registers as
operands do. A word has 2 or 4 codes; the first codes of all words are one operand, the second ones another: a product
over D channels becomes 2 or 4 products over as many *pieces* of them, and a sum of values has as many. In bfloat16 a
code becomes a number by one logical operation: an integer below 128 in the lower bits of 0x4300 is that integer plus
128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.kv_codes import KeyOffset
from lmdeploy.ops.triton.kv_codes import words
from lmdeploy.ops.triton.launch import next_power_of_2

TILE = 64  # keys per tile: a page, or a part of a longer one


def padded_words(dim: int, bits: int) -> int:
    """Words of a row of codes, rounded up to what products want."""
    return max(next_power_of_2(dim * bits // 16), 16)


@dataclass(frozen=True, slots=True)
class Pages:
    """A layer's pages as kernels take them; what there is not is None.

    Attributes:
        k, v: planes, or descriptors of tiles of them, with ``tma``; codes are words of 16 bits.
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
        k, v, bits, back = layer.k, layer.v, 0, None
        if layer.k_scales is not None:
            k, v, bits = k.view(torch.int16), v.view(torch.int16), 8 * k.shape[-1] // dim
        width = k.shape[-1]
        tma = tma and width * k.element_size() % 16 == 0  # what descriptors can describe
        if tma:
            box = [TILE, padded_words(dim, bits) if bits else max(next_power_of_2(width), 16)]
            k, v = (TensorDescriptor(pages, [pages.numel() // width, width], [width, 1], box) for pages in (k, v))
        k_scales, v_scales = (None, None) if layer.k_scales is None else map(words, layer.scales)
        if offset is not None:
            back = offset.turns.back(TILE, -(-longest // TILE))
        return cls(k, v, tma, bits, k_scales, v_scales,
                   None if offset is None else offset.within, back, 0 if back is None else back.shape[-1])


@triton.jit
def load_words(pages, at, WORDS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr):
    """``[TILE, PADDED] int16`` from row ``at`` of a plane seen as ``[rows, WORDS]``."""
    if TMA:
        tile = pages.load([at, 0])
    else:
        j = tl.arange(0, PADDED)
        place = pages + at.to(tl.int64) * WORDS + tl.arange(0, TILE)[:, None] * WORDS + j[None, :]
        if PADDED == WORDS:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(j < WORDS)[None, :], other=0)
    return tile


@triton.jit
def load_scales(scales, at):
    """Scale and zero, float32, of the words at ``at``."""
    word = tl.load(scales + at)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def two_pieces(words, KIND: tl.constexpr, ASM: tl.constexpr):
    """The lower and the upper bytes, signed, as numbers: seven bits of each as an integer, less 128 if the eighth is
    set."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up, low, sign, minus;
            mov.b32 minus, 0xbf80bf80;
            lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, sign, minus, low;
            shr.u32 up, $2, 8;
            lop3.b32 low, up, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 sign, up, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $1, sign, minus, low;
            }
            """, '=r,=r,r', [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)  # fmt: skip
    else:
        wide = words.to(tl.int32)
        return ((wide << 24) >> 24).to(KIND), (wide >> 8).to(KIND)


@triton.jit
def four_pieces(words, KIND: tl.constexpr, ASM: tl.constexpr):
    """The four halves of the bytes, the lowest first, as numbers; with ASM plus 128."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
            shr.u32 up, $4, 4;
            lop3.b32 $1, up, 0x000f000f, 0x43004300, 0xea;
            shr.u32 up, $4, 8;
            lop3.b32 $2, up, 0x000f000f, 0x43004300, 0xea;
            shr.u32 up, $4, 12;
            lop3.b32 $3, up, 0x000f000f, 0x43004300, 0xea;
            }
            """, '=r,=r,=r,=r,r', [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True,
            pack=2)  # fmt: skip
    else:
        wide = words.to(tl.int32)
        return ((wide & 15).to(KIND), ((wide >> 4) & 15).to(KIND), ((wide >> 8) & 15).to(KIND),
                ((wide >> 12) & 15).to(KIND))  # fmt: skip


@triton.jit
def channel_of(PIECE: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """The channels of a piece, ``[PADDED]``, in the layout of :class:`lmdeploy.kv.format.Codes`."""
    first: tl.constexpr = PIECE if BITS == 8 else PIECE // 2 + PIECE % 2 * (D // 2)
    return 2 * tl.arange(0, PADDED) + first


@triton.jit
def load_piece(base, rows, there, PIECE: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """The queries' channels of a piece, ``[M, PADDED]``; M rows begin at ``base + rows``."""
    channel = channel_of(PIECE, PADDED, D, BITS)
    inside = there[:, None] & (tl.arange(0, PADDED) < D * BITS // 16)[None, :]
    return tl.load(base + rows[:, None] + channel[None, :], mask=inside, other=0.0)


@triton.jit
def store_piece(base, rows, there, values, PIECE: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
                BITS: tl.constexpr):  # fmt: skip
    """Store ``values [M, PADDED]`` to the channels of a piece."""
    channel = channel_of(PIECE, PADDED, D, BITS)
    inside = there[:, None] & (tl.arange(0, PADDED) < D * BITS // 16)[None, :]
    tl.store(base + rows[:, None] + channel[None, :], values.to(base.dtype.element_ty), mask=inside)


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
def attend_codes(q, q_plain, q_rows, there, position, low, high, all_from, all_to, k_pages, v_pages, k_scales, v_scales,
                 table, head, within, back, scale, M: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                 PADDED: tl.constexpr, D_P: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
                 WINDOW: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, BITS: tl.constexpr,
                 ASM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Walk over the tiles [low, high) of keys of one head.

    Args:
        q, q_plain: the queries as they meet the codes and the offset; M rows begin at ``q_rows``, where ``there``.
        position: ``[M] int32``: the last key that a query sees.
        all_from, all_to: the tiles between are seen whole by all queries.
        within: ``[HEADS, 256, D] float32`` and back ``[tiles, 2, R] float32``: see ``KeyOffset``, ``Turns``; R is 0
            where there is no offset.
        scale: factor of the scores, times log2(e).

    Returns:
        Four pieces of the sums of weighted values, ``[M, PADDED]`` each, of which codes of 8 bits have two; the largest
        scores (base 2) and the sums of weights ``[M]``.
    """
    WORDS: tl.constexpr = D * BITS // 16
    KIND: tl.constexpr = q.dtype.element_ty
    SHIFT: tl.constexpr = 0 if BITS == 8 else (136 if ASM else 8)  # what is too much in a number of 4 bits
    q0 = load_piece(q, q_rows, there, 0, PADDED, D, BITS)
    q1 = load_piece(q, q_rows, there, 1, PADDED, D, BITS)
    total = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
    if BITS == 4:
        q2 = load_piece(q, q_rows, there, 2, PADDED, D, BITS)
        q3 = load_piece(q, q_rows, there, 3, PADDED, D, BITS)
        total += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
    n = tl.arange(0, TILE)
    acc0 = tl.zeros([M, PADDED], tl.float32)
    acc1 = tl.zeros([M, PADDED], tl.float32)
    acc2 = tl.zeros([M, PADDED], tl.float32)
    acc3 = tl.zeros([M, PADDED], tl.float32)
    top = tl.full([M], float('-inf'), tl.float32)
    weights = tl.zeros([M, TILE], tl.float32)  # summed over keys once, at the end
    zeros = tl.zeros([M, TILE], tl.float32)
    if R > 0:
        plain, other = load_plain(q_plain, q_rows, there, D, D_P, R)
        d = tl.arange(0, D_P)
        offsets = tl.load(within + head * (256 * D) + n[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    for tile in tl.range(low, high, num_stages=STAGES):
        block = tl.load(table + tile * TILE // BLOCK)
        place = (block * HEADS + head) * BLOCK + tile * TILE % BLOCK
        k = load_words(k_pages, place, WORDS, PADDED, TILE, TMA)
        k_scale, k_zero = load_scales(k_scales, place + n)
        if BITS == 8:
            k0, k1 = two_pieces(k, KIND, ASM)
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        else:
            k0, k1, k2, k3 = four_pieces(k, KIND, ASM)
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
            s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
            s = tl.dot(q3, tl.trans(k3), s, input_precision=PRECISION)
            k_zero -= SHIFT * k_scale
        s = s * (k_scale * scale)[None, :] + total[:, None] * (k_zero * scale)[None, :]
        if R > 0:
            turn = back + tile * (2 * R) + d
            cos = tl.load(turn, mask=d < R, other=1.0)
            sin = tl.load(turn + R, mask=d < R, other=0.0)
            turned = plain * cos[None, :] + other * sin[None, :]
            s += tl.dot(turned, tl.trans(offsets), input_precision=PRECISION) * scale
        if (tile >= all_to) | (tile < all_from):
            key = tile * TILE + n
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float('-inf'))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float('-inf'), 0.0, new)  # a query that has seen no key yet
        old_scale = tl.exp2(top - base)[:, None]
        e = tl.exp2(s - base[:, None])
        v_scale, v_zero = load_scales(v_scales, place + n)
        v = load_words(v_pages, place, WORDS, PADDED, TILE, TMA)
        p = (e * v_scale[None, :]).to(KIND)
        weights = weights * old_scale + e
        zeros = zeros * old_scale + e * v_zero[None, :]
        if BITS == 8:
            v0, v1 = two_pieces(v, KIND, ASM)
            acc0 = tl.dot(p, v0, acc0 * old_scale, input_precision=PRECISION)
            acc1 = tl.dot(p, v1, acc1 * old_scale, input_precision=PRECISION)
        else:
            zeros -= SHIFT * p.to(tl.float32)  # of the weights as they are multiplied
            v0, v1, v2, v3 = four_pieces(v, KIND, ASM)
            acc0 = tl.dot(p, v0, acc0 * old_scale, input_precision=PRECISION)
            acc1 = tl.dot(p, v1, acc1 * old_scale, input_precision=PRECISION)
            acc2 = tl.dot(p, v2, acc2 * old_scale, input_precision=PRECISION)
            acc3 = tl.dot(p, v3, acc3 * old_scale, input_precision=PRECISION)
        top = new
    zero = tl.sum(zeros, 1)[:, None]
    return acc0 + zero, acc1 + zero, acc2 + zero, acc3 + zero, top, tl.sum(weights, 1)


@triton.jit
def store_pieces(base, rows, there, acc0, acc1, acc2, acc3, PADDED: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Store what :func:`attend_codes` returns, pieces of M rows that begin at ``base + rows``."""
    store_piece(base, rows, there, acc0, 0, PADDED, D, BITS)
    store_piece(base, rows, there, acc1, 1, PADDED, D, BITS)
    if BITS == 4:
        store_piece(base, rows, there, acc2, 2, PADDED, D, BITS)
        store_piece(base, rows, there, acc3, 3, PADDED, D, BITS)
