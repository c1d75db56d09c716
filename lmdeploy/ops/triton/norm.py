"""RMS norms on a GPU: one program per row, the row in registers, one pass over memory.

Bound: bytes. A row of ``D`` channels is read once (twice with a residual) and written once (twice).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.norm import add_rms_norm, norm_add_rms_norm, rms_norm
from lmdeploy.ops.table import OpCase
from lmdeploy.ops.triton.launch import gdc_launch_dependents, gdc_wait, supports_pdl

_WIDEST = 16384  # channels that a program keeps in registers


@triton.jit
def normalised(x, weight, SIZE: tl.constexpr, eps):
    """float32 ``x`` (zero beyond SIZE) normalised and scaled."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight


@triton.jit
def _norm_kernel(
    x, residual, post_weight, weight, out, total, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, POST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < SIZE
    if PDL:
        gdc_launch_dependents()
    scale = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    if POST:
        post_scale = tl.load(post_weight + at, mask=there, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    values = tl.load(x + row * x_stride + at, mask=there, other=0.0)
    if POST:  # rounded, as a norm of its own would
        values = normalised(values.to(tl.float32), post_scale, SIZE, eps).to(values.dtype)
    if ADD:
        before = tl.load(residual + row * residual_stride + at, mask=there, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(values.dtype)
        tl.store(total + row * SIZE + at, values, mask=there)
    result = normalised(values.to(tl.float32), scale, SIZE, eps)
    tl.store(out + row * SIZE + at, result.to(out.dtype.element_ty), mask=there)


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype in (torch.bfloat16, torch.float16, torch.float32) else ['needs a floating-point type']


def _launch(x: Tensor, residual: Tensor | None, post_weight: Tensor | None, weight: Tensor,
            eps: float) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    size = x.shape[-1]
    if size > _WIDEST:
        raise ValueError(f'rows of {size} channels do not fit the registers of a program ({_WIDEST})')
    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = before = None
    if residual is not None:
        before = residual if residual.ndim == 2 and residual.stride(1) == 1 else residual.contiguous().view(-1, size)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        block, pdl = triton.next_power_of_2(size), supports_pdl(x.device)
        _norm_kernel[(len(rows),)](
            rows, before, post_weight, weight, out, total, rows.stride(0), 0 if before is None else before.stride(0),
            eps,
            SIZE=size, BLOCK=block, ADD=residual is not None, POST=post_weight is not None, PDL=pdl,
            num_warps=min(16, max(1, block // 512)), launch_pdl=pdl,
        )  # fmt: skip
    return out, total


@rms_norm.impl('cuda', when=_refuse)
def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, None, weight, eps)[0]


@add_rms_norm.impl('cuda', when=_refuse)
def triton_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = _launch(x, residual, None, weight, eps)
    assert total is not None
    return out, total


@norm_add_rms_norm.impl('cuda', when=_refuse)
def triton_norm_add_rms_norm(x: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor,
                             eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, total = _launch(x, residual, post_weight, weight, eps)
    assert total is not None
    return out, total
