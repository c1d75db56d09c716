"""Token embedding on a GPU: a gather whose ids lie on the device. Bound: bytes, a row read and written per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.embedding import embed
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, supports_pdl

_BLOCK = 2048


@triton.jit
def _embed_kernel(ids, table, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < WIDTH
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(ids + token).to(tl.int64)
    values = tl.load(table + row * WIDTH + at, mask=there, other=0.0).to(tl.float32) * scale
    tl.store(out + token * WIDTH + at, values.to(out.dtype.element_ty), mask=there)


@embed.impl('cuda')
def triton_embed(ids: Tensor, table: Tensor, scale: float) -> Tensor:
    width = table.shape[1]
    out = torch.empty(*ids.shape, width, dtype=table.dtype, device=table.device)
    if ids.numel():
        pdl = supports_pdl(table.device)
        _embed_kernel[(cdiv(width, _BLOCK), ids.numel())](
            ids.contiguous(), table, out, scale, WIDTH=width, BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return out
