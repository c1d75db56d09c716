"""Gated activations on a GPU: one pass, float32 inside. Bound: bytes, ``2 I`` read and ``I`` written per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.activation import gelu_tanh_mul, silu_mul
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, supports_pdl

_BLOCK = 1024


@triton.jit
def gated(gate, up, GATE: tl.constexpr):
    """``activation(gate) * up`` of float32 tensors, for 'silu' and 'gelu_tanh'."""
    if GATE == 'silu':
        return gate / (1.0 + tl.exp(-gate)) * up
    inner = 0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)
    return gate * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner))) * up  # (1 + tanh(a)) / 2 = 1 - 1 / (1 + exp(2 a))


@triton.jit
def _gated_kernel(
    x, out, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < WIDTH
    if GROUP == 0:  # all of the gate, then all of up
        first, distance = at, WIDTH
    else:  # GROUP channels of the gate, GROUP of up, and so on
        first, distance = at // GROUP * (2 * GROUP) + at % GROUP, GROUP
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x + row * x_stride + first, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + first + distance, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, gated(gate, up, GATE).to(out.dtype.element_ty), mask=there)


def gate_mul(x: Tensor, activation: str, group: int = 0) -> Tensor:
    """``activation(gate) * up``: ``[..., 2 I]`` to ``[..., I]``; ``group`` > 0: they alternate every so many channels.

    ``activation`` is a key of ``lmdeploy.ops.activation.ACTIVATIONS``; I is a multiple of ``group``.
    """
    width = x.shape[-1] // 2
    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, 2 * width)
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if len(rows):
        pdl = supports_pdl(x.device)
        _gated_kernel[(cdiv(width, _BLOCK), len(rows))](
            rows, out, rows.stride(0), WIDTH=width, BLOCK=_BLOCK, GROUP=group, GATE=activation, PDL=pdl, num_warps=4,
            launch_pdl=pdl,
        )  # fmt: skip
    return out


@silu_mul.impl('cuda')
def triton_silu_mul(x: Tensor) -> Tensor:
    return gate_mul(x, 'silu')


@gelu_tanh_mul.impl('cuda')
def triton_gelu_tanh_mul(x: Tensor) -> Tensor:
    return gate_mul(x, 'gelu_tanh')
