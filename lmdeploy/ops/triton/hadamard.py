"""The block Hadamard transform on a GPU: a product with a matrix of ones and minus ones that is made in registers.

Bound: bytes. Every element is read and written once; the product takes ``2 * block`` operations for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.hadamard import hadamard
from lmdeploy.ops.table import OpCase
from lmdeploy.ops.triton.launch import gdc_launch_dependents, gdc_wait, supports_pdl

_LEAST, _MOST = 16, 128  # sizes of a block that one product takes


@triton.jit
def _signs(SIZE: tl.constexpr):
    """``[SIZE, SIZE]`` of 1 and -1: the parity of the bits that row and column share."""
    shared = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = shared ^ (shared >> 1)
    return 1 - 2 * (shared & 1)


@triton.jit(do_not_specialize=['rows'])
def _hadamard_kernel(
    x, out, rows, x_stride, out_stride, factor,
    ROWS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = (at < rows)[:, None]
    if PDL:
        gdc_launch_dependents()
    signs = _signs(SIZE).to(x.dtype.element_ty)
    if PDL:
        gdc_wait()
    values = tl.load(x + at[:, None] * x_stride + channels[None, :], mask=there, other=0.0)
    if EXACT:
        spread = tl.dot(values, signs, input_precision='tf32x3')
    else:
        spread = tl.dot(values, signs)
    tl.store(out + at[:, None] * out_stride + channels[None, :], (spread * factor).to(out.dtype.element_ty), mask=there)


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype in (torch.bfloat16, torch.float16, torch.float32) else ['needs a floating-point type']


@hadamard.impl('cuda', when=_refuse)
def triton_hadamard(x: Tensor, block: int) -> Tensor:
    if not _LEAST <= block <= _MOST or block & block - 1:
        return hadamard.reference(x, block)
    width = x.shape[-1]
    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count, pdl = len(rows), supports_pdl(x.device)
    tall = 16 if count <= 256 else 64
    if count:
        _hadamard_kernel[(triton.cdiv(count, tall), width // block)](
            rows, out, count, rows.stride(0), width, block**-0.5,
            ROWS=tall, SIZE=block, EXACT=x.dtype is torch.float32, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return out
