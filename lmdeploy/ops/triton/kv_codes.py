"""Keys and values as codes on a GPU: norm, rotation, quantisation and cache write of a layer in one pass.

Bound: bytes, as for :mod:`lmdeploy.ops.triton.rope`. A scale and its zero are one word of 32 bits, scale below.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.kv_codes import MOST, KeyBasis, hadamard_block, rope_write_codes
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, next_power_of_2, supports_pdl

_HEADS = 8  # heads per program
_TOKENS = 16  # tokens per program that turns keys and queries to their axes: the least that products take
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """``x [ROWS, WIDTH]`` times the orthonormal Hadamard matrix of each BLOCK of channels, ``2 ** TURNS`` of them.

    A turn splits at the leading bit of the channel's number and appends it behind.
    """
    y = tl.reshape(x, [ROWS * (WIDTH // BLOCK), BLOCK])
    factor = 1.0
    for _ in tl.static_range(TURNS):
        left, right = tl.split(tl.permute(tl.reshape(y, [ROWS * (WIDTH // BLOCK), 2, BLOCK // 2]), (0, 2, 1)))
        y = tl.reshape(tl.join(left + right, left - right), [ROWS * (WIDTH // BLOCK), BLOCK])
        factor *= 0.7071067811865476
    return tl.reshape(y * factor, [ROWS, WIDTH])


@triton.jit
def _half_bits(x):
    """The bits of ``x`` as a float16, in the lower half of an int32."""
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize_on_alignment=('slots',))
def _write_codes_kernel(
    qkv, cos, sin, q_weight, k_weight, eps, offset, q_coded, q_plain, k_pages, v_pages, k_scales, v_scales, slots,
    stride,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    H: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, HADAMARD: tl.constexpr,
    TURNS: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Channels lie in two halves of HALF, a power of two: a byte of two codes takes one from each."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * H
    head = first + tl.arange(0, H)
    i = tl.arange(0, 2 * HALF)
    there = i % HALF < D // 2
    d = i // HALF * (D // 2) + i % HALF
    inside = (head < HEADS + 2 * KV)[:, None] & there[None, :]
    turns = there & (d < R)
    turned = (head < HEADS + KV)[:, None] & turns[None, :]
    partner = tl.where(d < R // 2, d + R // 2, d - R // 2)  # only used where the channel turns
    row = qkv + token * stride + head[:, None] * D
    x = tl.load(row + d[None, :], mask=inside, other=0.0)
    y = tl.load(row + partner[None, :], mask=turned, other=0.0)
    value = x.to(tl.float32)
    other = y.to(tl.float32)
    kv_head = head - HEADS
    is_k = (kv_head >= 0) & (kv_head < KV)
    is_v = (kv_head >= KV) & (kv_head < 2 * KV)
    if NORM:
        normed = (head < HEADS + KV)[:, None]
        is_q = (head < HEADS)[:, None]
        scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        weight = tl.where(is_q, tl.load(q_weight + d, mask=there, other=0.0).to(tl.float32)[None, :],
                          tl.load(k_weight + d, mask=there, other=0.0).to(tl.float32)[None, :])  # fmt: skip
        other_weight = tl.where(
            is_q, tl.load(q_weight + partner, mask=turns, other=0.0).to(tl.float32)[None, :],
            tl.load(k_weight + partner, mask=turns, other=0.0).to(tl.float32)[None, :])  # fmt: skip
        value = tl.where(normed, (value * scale * weight).to(x.dtype).to(tl.float32), value)
        other = (other * scale * other_weight).to(x.dtype).to(tl.float32)
    if OFFSET:
        off = offset + kv_head[:, None] * D
        value -= tl.load(off + d[None, :], mask=is_k[:, None] & there[None, :], other=0.0)
        other -= tl.load(off + partner[None, :], mask=is_k[:, None] & turns[None, :], other=0.0)
    table = token * R + d
    c = tl.load(cos + table, mask=turns, other=1.0)
    s = tl.load(sin + table, mask=turns, other=0.0)
    value = tl.where(turned, value * c[None, :] + other * s[None, :], value)
    q_at = token * (HEADS * D) + head[:, None] * D + d[None, :]
    is_q = (head < HEADS)[:, None] & inside
    if OFFSET and BITS == 4:
        tl.store(q_plain + q_at, value.to(q_plain.dtype.element_ty), mask=is_q)
    # the cache stays finite: infinities and NaN are stored as 0
    value = tl.where(is_q | (tl.abs(value) < float('inf')), value, 0.0)
    if BITS == 4:
        value = tl.where(is_v[:, None], value, _hadamard(value, H, 2 * HALF, HADAMARD, TURNS))
    tl.store(q_coded + q_at, value.to(q_coded.dtype.element_ty), mask=is_q)
    if first + H > HEADS:
        low = tl.min(tl.where(there[None, :], value, float('inf')), 1)
        high = tl.max(tl.where(there[None, :], value, float('-inf')), 1)
        STEPS: tl.constexpr = 255.0 if BITS == 8 else 15.0
        MIDDLE: tl.constexpr = 128.0 if BITS == 8 else 8.0
        step = tl.minimum((high - low) / STEPS, MOST).to(tl.float16).to(tl.float32)
        zero = tl.maximum(tl.minimum((high + low + step) * 0.5, MOST), -MOST).to(tl.float16).to(tl.float32)
        inverse = tl.where(step > 0, 1.0 / step, 0.0)
        codes = tl.floor((value - zero[:, None]) * inverse[:, None] + 0.5)
        codes = tl.maximum(tl.minimum(codes, MIDDLE - 1), -MIDDLE)
        slot = tl.load(slots + token)
        plane_head = tl.where(is_v, kv_head - KV, kv_head)
        place = (slot // BLOCK * KV + plane_head) * BLOCK + slot % BLOCK
        word = _half_bits(step) | _half_bits(zero) << 16
        tl.store(k_scales + place, word, mask=is_k)
        tl.store(v_scales + place, word, mask=is_v)
        if BITS == 8:
            at = place[:, None] * D + d[None, :]
            stored = codes.to(tl.int8)
            tl.store(k_pages + at, stored, mask=is_k[:, None] & inside)
            tl.store(v_pages + at, stored, mask=is_v[:, None] & inside)
        else:
            halves = tl.permute(tl.reshape((codes + 8).to(tl.int32), [H, 2, HALF]), (0, 2, 1))
            lower, upper = tl.split(halves)
            packed = (lower | upper << 4).to(tl.int8)
            j = tl.arange(0, HALF)
            at = place[:, None] * (D // 2) + j[None, :]
            tl.store(k_pages + at, packed, mask=is_k[:, None] & (j < D // 2)[None, :])
            tl.store(v_pages + at, packed, mask=is_v[:, None] & (j < D // 2)[None, :])


@triton.jit
def _rotated(rows, there, d, inside, turns, partner, weight, offset, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr,
             OFFSET: tl.constexpr):  # fmt: skip
    """``[T, D_P] float32``: one head of T tokens at ``rows``, normalised, its offset taken off, rotated."""
    x = tl.load(rows[:, None] + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    y = tl.load(rows[:, None] + partner[None, :], mask=there[:, None] & turns[None, :], other=0.0)
    value = x.to(tl.float32)
    other = y.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        by = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        other_by = tl.load(weight + partner, mask=turns, other=0.0).to(tl.float32)[None, :]
        value = (value * scale * by).to(x.dtype).to(tl.float32)
        other = (other * scale * other_by).to(x.dtype).to(tl.float32)
    if OFFSET:
        value -= tl.load(offset + d, mask=inside, other=0.0)[None, :]
        other -= tl.load(offset + partner, mask=turns, other=0.0)[None, :]
    return tl.where(turns[None, :], value * cos + other * sin, value)


@triton.jit
def _quantised_halves(value, inside, MOST: tl.constexpr):
    """Codes of 4 bits of ``value [T, 2 H]``, the first half below, ``[T, H] int8``; words of scale and zero ``[T]``."""
    T: tl.constexpr = value.shape[0]
    HALF: tl.constexpr = value.shape[1] // 2
    low = tl.min(tl.where(inside[None, :], value, float('inf')), 1)
    high = tl.max(tl.where(inside[None, :], value, float('-inf')), 1)
    step = tl.minimum((high - low) / 15.0, MOST).to(tl.float16).to(tl.float32)
    zero = tl.maximum(tl.minimum((high + low + step) * 0.5, MOST), -MOST).to(tl.float16).to(tl.float32)
    inverse = tl.where(step > 0, 1.0 / step, 0.0)
    codes = tl.floor((value - zero[:, None]) * inverse[:, None] + 0.5) + 8
    codes = tl.maximum(tl.minimum(codes, 15.0), 0.0).to(tl.int32)
    lower, upper = tl.split(tl.permute(tl.reshape(codes, [T, 2, HALF]), (0, 2, 1)))
    return (lower | upper << 4).to(tl.int8), _half_bits(step) | _half_bits(zero) << 16


@triton.jit(do_not_specialize=('tokens',), do_not_specialize_on_alignment=('slots',))
def _write_turned_kernel(
    qkv, cos, sin, q_weight, k_weight, eps, offset, key_axes, query_axes, q_coded, q_plain, k_pages, v_pages, k_scales,
    v_scales, slots, tokens, stride,
    GROUP: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    T: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, MOST: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """T tokens of one key head and its query heads; channels as in the kernel above."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kv_head = tl.program_id(1)
    token = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    there = token < tokens
    i = tl.arange(0, 2 * HALF)
    inside = i % HALF < D // 2
    d = i // HALF * (D // 2) + i % HALF
    turns = inside & (d < R)
    partner = tl.where(d < R // 2, d + R // 2, d - R // 2)  # only used where the channel turns
    axes = kv_head * (D * D) + d[:, None] * D + d[None, :]
    both = inside[:, None] & inside[None, :]
    table = token[:, None] * R + d[None, :]
    turn = there[:, None] & turns[None, :]
    c = tl.load(cos + table, mask=turn, other=1.0)
    s = tl.load(sin + table, mask=turn, other=0.0)
    stored = there[:, None] & inside[None, :]
    matrix = tl.load(query_axes + axes, mask=both, other=0.0)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        value = _rotated(qkv + token * stride + head * D, there, d, inside, turns, partner, q_weight, offset, c, s, eps,
                         D, NORM, False)  # fmt: skip
        at = token[:, None] * (KV * GROUP * D) + head * D + d[None, :]
        if OFFSET:
            tl.store(q_plain + at, value.to(q_plain.dtype.element_ty), mask=stored)
        coded = tl.dot(value, matrix, input_precision=PRECISION)
        tl.store(q_coded + at, coded.to(q_coded.dtype.element_ty), mask=stored)
    key = _rotated(qkv + token * stride + (KV * GROUP + kv_head) * D, there, d, inside, turns, partner, k_weight,
                   offset + kv_head * D if OFFSET else offset, c, s, eps, D, NORM, OFFSET)  # fmt: skip
    key = tl.where(tl.abs(key) < float('inf'), key, 0.0)  # the cache stays finite
    key = tl.dot(key, tl.load(key_axes + axes, mask=both, other=0.0), input_precision=PRECISION)
    v_at = qkv + (token * stride + (KV * GROUP + KV + kv_head) * D)[:, None] + d[None, :]
    v = tl.load(v_at, mask=stored, other=0.0).to(tl.float32)
    v = tl.where(tl.abs(v) < float('inf'), v, 0.0)
    slot = tl.load(slots + token, mask=there, other=0)
    place = (slot // BLOCK * KV + kv_head) * BLOCK + slot % BLOCK
    j = tl.arange(0, HALF)
    at = place[:, None] * (D // 2) + j[None, :]
    mask = there[:, None] & (j < D // 2)[None, :]
    packed, word = _quantised_halves(key, inside, MOST)
    tl.store(k_pages + at, packed, mask=mask)
    tl.store(k_scales + place, word, mask=there)
    packed, word = _quantised_halves(v, inside, MOST)
    tl.store(v_pages + at, packed, mask=mask)
    tl.store(v_scales + place, word, mask=there)


def words(scales: Tensor) -> Tensor:
    """``[..., 2] float16`` as ``[...] int32``."""
    return scales.view(torch.int32)[..., 0]


@rope_write_codes.impl('cuda', when=lambda case: [] if case.dtype in _FLOATS else ['needs a floating-point type'])
def triton_rope_write_codes(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
                            eps: float, offset: Tensor | None, basis: KeyBasis | None, layer: KVLayer,
                            slots: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tokens, all_heads, dim = qkv.shape
    kv_heads, block_size, width = layer.k.shape[1:]
    heads, bits = all_heads - 2 * kv_heads, 8 * width // dim
    assert qkv.stride(2) == 1 and qkv.stride(1) == dim
    coded = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    plain = coded if bits == 8 or offset is None else torch.empty_like(coded)
    k_scales, v_scales = map(words, layer.scales)
    pdl, half = supports_pdl(qkv.device), next_power_of_2(dim // 2)
    if not tokens:
        return coded, None if offset is None else plain
    if bits == 4 and basis is not None:
        _write_turned_kernel[(cdiv(tokens, _TOKENS), kv_heads)](
            qkv, cos, sin, q_weight, k_weight, eps, offset, basis.keys, basis.queries, coded, plain, layer.k, layer.v,
            k_scales, v_scales, slots, tokens, qkv.stride(0), GROUP=heads // kv_heads, KV=kv_heads, D=dim,
            HALF=max(half, 8), R=cos.shape[-1], BLOCK=block_size, T=_TOKENS, NORM=q_weight is not None,
            OFFSET=offset is not None, MOST=MOST, PRECISION='tf32x3' if qkv.dtype == torch.float32 else 'tf32',
            PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    else:
        block = hadamard_block(dim)
        _write_codes_kernel[(tokens, cdiv(all_heads, _HEADS))](
            qkv, cos, sin, q_weight, k_weight, eps, offset, coded, plain, layer.k, layer.v, k_scales, v_scales, slots,
            qkv.stride(0), HEADS=heads, KV=kv_heads, D=dim, HALF=half, R=cos.shape[-1], BLOCK=block_size, H=_HEADS,
            NORM=q_weight is not None, OFFSET=offset is not None, BITS=bits, HADAMARD=block,
            TURNS=block.bit_length() - 1, MOST=MOST, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return coded, None if offset is None else plain
