"""Rotary embedding on a GPU: its tables once per step, and norm, rotation and cache write of a layer in one pass.

Bound: bytes. The packed projection is read once and written once, to the queries and to the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.rope import rope_tables, rope_write_kv
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, next_power_of_2, supports_pdl

_HEADS = 8  # heads per program
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize_on_alignment=('positions',))
def _tables_kernel(positions, frequencies, cos, sin, factor, HALF: tl.constexpr, BLOCK: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    there = i < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + i, mask=there, other=0.0)
    c, s = tl.cos(angle) * factor, tl.sin(angle) * factor
    row = token * (2 * HALF)
    tl.store(cos + row + i, c, mask=there)
    tl.store(cos + row + HALF + i, c, mask=there)
    tl.store(sin + row + i, -s, mask=there)
    tl.store(sin + row + HALF + i, s, mask=there)


@rope_tables.impl('cuda')
def triton_rope_tables(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    half, pdl = frequencies.numel(), supports_pdl(positions.device)
    cos, sin = (torch.empty(len(positions), 1, 2 * half, device=positions.device) for _ in range(2))
    if len(positions):
        _tables_kernel[(len(positions),)](positions, frequencies, cos, sin, float(factor), HALF=half,
                                          BLOCK=next_power_of_2(half), PDL=pdl, num_warps=1, launch_pdl=pdl)
    return cos, sin


@triton.jit(do_not_specialize_on_alignment=('slots',))
def _write_kernel(
    qkv, cos, sin, q_weight, k_weight, eps, q_out, k_pages, v_pages, slots, stride,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    H: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    d = tl.arange(0, D_P)
    inside = (head < HEADS + 2 * KV)[:, None] & (d < D)[None, :]
    turned = (head < HEADS + KV)[:, None] & (d < R)[None, :]
    partner = tl.where(d < R // 2, d + R // 2, d - R // 2)  # only used where the channel turns
    row = qkv + token * stride + head[:, None] * D
    x = tl.load(row + d[None, :], mask=inside, other=0.0)
    y = tl.load(row + partner[None, :], mask=turned, other=0.0)
    value = x.to(tl.float32)
    other = y.to(tl.float32)
    if NORM:
        normed = (head < HEADS + KV)[:, None]
        is_q = (head < HEADS)[:, None]
        scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        weight = tl.where(is_q, tl.load(q_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :],
                          tl.load(k_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :])  # fmt: skip
        turns = d < R
        other_weight = tl.where(
            is_q, tl.load(q_weight + partner, mask=turns, other=0.0).to(tl.float32)[None, :],
            tl.load(k_weight + partner, mask=turns, other=0.0).to(tl.float32)[None, :])  # fmt: skip
        value = tl.where(normed, (value * scale * weight).to(x.dtype).to(tl.float32), value)
        other = (other * scale * other_weight).to(x.dtype).to(tl.float32)
    table = token * R + d
    c = tl.load(cos + table, mask=d < R, other=1.0)
    s = tl.load(sin + table, mask=d < R, other=0.0)
    value = tl.where(turned, value * c[None, :] + other * s[None, :], value)
    is_q = (head < HEADS)[:, None] & inside
    tl.store(q_out + token * (HEADS * D) + head[:, None] * D + d[None, :], value.to(q_out.dtype.element_ty), mask=is_q)
    # the cache stays finite: infinities and NaN are stored as 0
    value = tl.where(tl.abs(value) < float('inf'), value, 0.0)
    slot = tl.load(slots + token)
    kv_head = head - HEADS
    is_k = (kv_head >= 0) & (kv_head < KV)
    is_v = (kv_head >= KV) & (kv_head < 2 * KV)
    plane_head = tl.where(is_v, kv_head - KV, kv_head)
    at = ((slot // BLOCK * KV + plane_head[:, None]) * BLOCK + slot % BLOCK) * D + d[None, :]
    stored = value.to(k_pages.dtype.element_ty)
    tl.store(k_pages + at, stored, mask=is_k[:, None] & inside)
    tl.store(v_pages + at, stored, mask=is_v[:, None] & inside)


@rope_write_kv.impl('cuda', when=lambda case: [] if case.dtype in _FLOATS else ['needs a floating-point type'])
def triton_rope_write_kv(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
                         eps: float, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> Tensor:  # fmt: skip
    tokens, all_heads, dim = qkv.shape
    kv_heads, block_size = k_pages.shape[1:3]
    heads = all_heads - 2 * kv_heads
    assert qkv.stride(2) == 1 and qkv.stride(1) == dim
    out = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if tokens:
        pdl = supports_pdl(qkv.device)
        _write_kernel[(tokens, cdiv(all_heads, _HEADS))](
            qkv, cos, sin, q_weight, k_weight, eps, out, k_pages, v_pages, slots, qkv.stride(0),
            HEADS=heads, KV=kv_heads, D=dim, D_P=next_power_of_2(dim), R=cos.shape[-1], BLOCK=block_size,
            H=_HEADS, NORM=q_weight is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return out
