"""Layer norm after an addition on a GPU: one program per row, the row in registers.

Bound: bytes. A row of ``D`` channels is read twice and written twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.layer_norm import add_layer_norm
from lmdeploy.ops.table import OpCase
from lmdeploy.ops.triton.launch import gdc_launch_dependents, gdc_wait, next_power_of_2, supports_pdl

_WIDEST = 16384  # channels that a program keeps in registers


@triton.jit
def _add_layer_norm_kernel(x, residual, scale, weight, bias, out, total, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                           SCALED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < SIZE
    if PDL:
        gdc_launch_dependents()
    gain = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        factor = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    values = tl.load(x + row * SIZE + at, mask=there, other=0.0).to(tl.float32)
    before = tl.load(residual + row * SIZE + at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        values = values * factor
    sums = (values + before).to(total.dtype.element_ty)
    tl.store(total + row * SIZE + at, sums, mask=there)
    wide = sums.to(tl.float32)
    centred = tl.where(there, wide - tl.sum(wide, 0) / SIZE, 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred, 0) / SIZE + eps) * gain + shift
    tl.store(out + row * SIZE + at, result.to(out.dtype.element_ty), mask=there)


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype in (torch.bfloat16, torch.float16, torch.float32) else ['needs a floating-point type']


@add_layer_norm.impl('cuda', when=_refuse)
def triton_add_layer_norm(x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor,
                          eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = x.shape[1]
    if size > _WIDEST:
        raise ValueError(f'rows of {size} channels do not fit the registers of a program ({_WIDEST})')
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    if len(x):
        block, pdl = next_power_of_2(size), supports_pdl(x.device)
        _add_layer_norm_kernel[(len(x),)](
            x, residual, scale, weight, bias, out, total, eps, SIZE=size, BLOCK=block, SCALED=scale is not None,
            PDL=pdl, num_warps=min(16, max(1, block // 512)), launch_pdl=pdl,
        )  # fmt: skip
    return out, total
