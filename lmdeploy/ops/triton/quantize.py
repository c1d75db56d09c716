"""Quantising inputs on a GPU, alone and behind what makes them: one program per row, the row in registers.

Bound: bytes. A row is read once in 16 bits and written once in 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.linear import GATE_GROUP
from lmdeploy.ops.quantize import (
    FLOAT8_FLOOR,
    INT8_EPS,
    LARGEST,
    TYPES,
    add_rms_norm_quantize,
    gate_mul_quantize,
    quantize_static,
    quantize_tokens,
    rms_norm_quantize,
)
from lmdeploy.ops.table import OpCase
from lmdeploy.ops.triton.activation import gated
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, next_power_of_2, supports_pdl
from lmdeploy.ops.triton.norm import normalised

_WIDEST = 32768  # channels that a program keeps in registers


@triton.jit
def _to_codes(scaled, type: tl.constexpr, LARGEST: tl.constexpr):
    if type == tl.int8:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
    return tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(type)


@triton.jit
def _store_codes(values, row, codes, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
                 LARGEST: tl.constexpr, LEAST: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Quantise a row: ``values [BLOCK]`` float32, zero beyond SIZE."""
    at = tl.arange(0, BLOCK)
    type: tl.constexpr = codes.dtype.element_ty
    if GROUP == 0:
        scale = tl.math.div_rn(tl.maximum(tl.max(tl.abs(values), 0), LEAST), LARGEST)
        tl.store(scales + row, scale)
        found = _to_codes(tl.math.div_rn(values, tl.broadcast_to(scale, (BLOCK,))), type, LARGEST)
    else:
        groups: tl.constexpr = BLOCK // GROUP
        held: tl.constexpr = (SIZE + GROUP - 1) // GROUP
        parts = tl.reshape(values, (groups, GROUP))
        scale = tl.maximum(tl.max(tl.abs(parts), 1), LEAST)
        scale = tl.math.div_rn(scale, tl.full((groups,), LARGEST, tl.float32))
        index = tl.arange(0, groups)
        tl.store(scales + row * held + index, scale, mask=index < held)
        found = _to_codes(tl.math.div_rn(parts, tl.broadcast_to(scale[:, None], (groups, GROUP))), type, LARGEST)
        found = tl.reshape(found, (BLOCK,))
    if TURNED:  # bits of a channel's number, from the lowest: 0, 3, 1, 2
        bits = tl.reshape(found, (BLOCK // 16, 2, 2, 2, 2))
        found = tl.reshape(tl.permute(bits, (0, 2, 3, 1, 4)), (BLOCK,))
    tl.store(codes + row * SIZE + at, found, mask=at < SIZE)


@triton.jit
def _tokens_kernel(
    x, codes, scales, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr,
    LEAST: tl.constexpr, TURNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + row * x_stride + at, mask=at < SIZE, other=0.0).to(tl.float32)
    _store_codes(values, row, codes, scales, SIZE, BLOCK, GROUP, LARGEST, LEAST, TURNED)


@triton.jit
def _static_kernel(
    x, codes, scale, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + row * x_stride + at, mask=at < SIZE, other=0.0).to(tl.float32)
    scaled = tl.math.div_rn(values, tl.broadcast_to(tl.load(scale).to(tl.float32), (BLOCK,)))
    tl.store(codes + row * SIZE + at, _to_codes(scaled, codes.dtype.element_ty, LARGEST), mask=at < SIZE)


@triton.jit
def _norm_kernel(
    x, residual, weight, codes, scales, total, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    TURNED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < SIZE
    if PDL:
        gdc_launch_dependents()
    factor = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    values = tl.load(x + row * x_stride + at, mask=there, other=0.0)
    if ADD:
        before = tl.load(residual + row * residual_stride + at, mask=there, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(values.dtype)
        tl.store(total + row * SIZE + at, values, mask=there)
    result = normalised(values.to(tl.float32), factor, SIZE, eps).to(values.dtype)  # rounded, as a norm alone would
    _store_codes(result.to(tl.float32), row, codes, scales, SIZE, BLOCK, GROUP, LARGEST, LEAST, TURNED)


@triton.jit
def _gated_kernel(
    x, codes, scales, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr,
    LEAST: tl.constexpr, TURNED: tl.constexpr, TURN: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < SIZE
    if TURN == 0:
        first, distance = at, SIZE
    else:
        first, distance = at // TURN * (2 * TURN) + at % TURN, TURN
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x + row * x_stride + first, mask=there, other=0.0)
    up = tl.load(x + row * x_stride + first + distance, mask=there, other=0.0)
    result = gated(gate.to(tl.float32), up.to(tl.float32), GATE).to(gate.dtype)
    _store_codes(result.to(tl.float32), row, codes, scales, SIZE, BLOCK, GROUP, LARGEST, LEAST, TURNED)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _results(x: Tensor, size: int, kind: str, group: int) -> tuple[Tensor, Tensor]:
    groups = cdiv(size, group) if group else 1
    return (torch.empty(len(x), size, dtype=TYPES[kind], device=x.device),
            torch.empty(len(x), groups, dtype=torch.float32, device=x.device))  # fmt: skip


def _least(kind: str) -> float:
    return INT8_EPS if kind == 'int8' else FLOAT8_FLOOR


def _block(size: int, group: int, turned: bool = False) -> int:
    if turned and size % 16:
        raise ValueError(f'{size} channels are not whole groups of 16')
    if size > _WIDEST or group & group - 1:
        raise ValueError(f'rows of {size} channels in groups of {group} do not fit a program')
    return max(next_power_of_2(size), group)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, x.shape[-1])


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype in (torch.bfloat16, torch.float16, torch.float32) else ['needs a floating-point type']


@quantize_tokens.impl('cuda', when=_refuse)
def triton_quantize_tokens(x: Tensor, kind: str, group: int, turned: bool = False) -> tuple[Tensor, Tensor]:
    rows, size = _rows(x), x.shape[-1]
    codes, scales = _results(rows, size, kind, group)
    if len(rows):
        block, pdl = _block(size, group, turned), supports_pdl(x.device)
        _tokens_kernel[(len(rows),)](
            rows, codes, scales, rows.stride(0), SIZE=size, BLOCK=block, GROUP=group, LARGEST=LARGEST[kind],
            LEAST=_least(kind), TURNED=turned, PDL=pdl, num_warps=_warps(block), launch_pdl=pdl)  # fmt: skip
    return codes, scales


@quantize_static.impl('cuda', when=_refuse)
def triton_quantize_static(x: Tensor, kind: str, scale: Tensor) -> Tensor:
    rows, size = _rows(x), x.shape[-1]
    codes = torch.empty(len(rows), size, dtype=TYPES[kind], device=x.device)
    if len(rows):
        block, pdl = _block(size, 0), supports_pdl(x.device)
        _static_kernel[(len(rows),)](
            rows, codes, scale, rows.stride(0), SIZE=size, BLOCK=block, LARGEST=LARGEST[kind], PDL=pdl,
            num_warps=_warps(block), launch_pdl=pdl)  # fmt: skip
    return codes


def _launch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, kind: str, group: int,
                 turned: bool) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    rows, size = _rows(x), x.shape[-1]
    before = None if residual is None else _rows(residual)
    codes, scales = _results(rows, size, kind, group)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        block, pdl = _block(size, group, turned), supports_pdl(x.device)
        _norm_kernel[(len(rows),)](
            rows, before, weight, codes, scales, total, rows.stride(0), 0 if before is None else before.stride(0), eps,
            SIZE=size, BLOCK=block, GROUP=group, LARGEST=LARGEST[kind], LEAST=_least(kind), TURNED=turned,
            ADD=residual is not None, PDL=pdl, num_warps=_warps(block), launch_pdl=pdl)  # fmt: skip
    return codes, scales, total


@rms_norm_quantize.impl('cuda', when=_refuse)
def triton_rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, kind: str, group: int,
                             turned: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_norm(x, None, weight, eps, kind, group, turned)[:2]


@add_rms_norm_quantize.impl('cuda', when=_refuse)
def triton_add_rms_norm_quantize(x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: str, group: int,
                                 turned: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    codes, scales, total = _launch_norm(x, residual, weight, eps, kind, group, turned)
    assert total is not None
    return codes, scales, total


@gate_mul_quantize.impl('cuda', when=_refuse)
def triton_gate_mul_quantize(x: Tensor, activation: str, interleaved: bool, kind: str, group: int,
                             turned: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, size = _rows(x), x.shape[-1] // 2
    codes, scales = _results(rows, size, kind, group)
    if len(rows):
        block, pdl = _block(size, group, turned), supports_pdl(x.device)
        _gated_kernel[(len(rows),)](
            rows, codes, scales, rows.stride(0), SIZE=size, BLOCK=block, GROUP=group, LARGEST=LARGEST[kind],
            LEAST=_least(kind), TURNED=turned, TURN=GATE_GROUP if interleaved else 0, GATE=activation, PDL=pdl,
            num_warps=_warps(block), launch_pdl=pdl)  # fmt: skip
    return codes, scales
