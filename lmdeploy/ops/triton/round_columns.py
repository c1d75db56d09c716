"""GPTQ's inner loop on a GPU: a tile of outputs stays in the registers of one warp while all channels of a block go by.

In place of some eight launches for every channel there is one for a block of 128. Bound: the latency of a chain of
channels, each of which needs a reduction over the tile to take its row out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.round_columns import round_columns
from lmdeploy.ops.table import OpCase

_OUTPUTS = 32  # of a tile
_MOST = 128  # channels of a block
_FAR = 1 << 20  # codes are nowhere near
_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits for a fraction, ties go to even


@triton.jit(do_not_specialize=['outputs'])
def _round_columns_kernel(
    targets, mixing, scales, zeros, held, codes, change, outputs, stride, mixing_stride, low, high, far,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ZEROS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows = tl.arange(0, BLOCK)
    there = at < outputs
    tile = tl.load(targets + rows[:, None].to(tl.int64) * stride + at[None, :],
                   mask=(rows < COUNT)[:, None] & there[None, :], other=0.0)  # fmt: skip
    for j in range(COUNT):
        aim = tl.sum(tl.where((rows == j)[:, None], tile, 0.0), 0)
        here = j * outputs + at
        scale = tl.load(scales + here, mask=there, other=1.0)
        code = tl.clamp(tl.div_rn(aim, scale), -far, far)
        code = (code + _NEAREST) - _NEAREST
        if ZEROS:
            zero = tl.load(zeros + here, mask=there, other=0.0)
            code = tl.clamp(code + zero, low, high)
            value = (code - zero) * scale
        else:
            code = tl.clamp(code, low, high)
            value = code * scale
        tl.store(codes + here, code.to(tl.int16), mask=there)
        before = tl.load(held + here, mask=there, other=0.0) if HELD else aim
        moved = value - before
        tl.store(change + here, moved, mask=there)
        mixed = tl.load(mixing + j * mixing_stride + rows, mask=(rows > j) & (rows < COUNT), other=0.0)
        tile += mixed[:, None] * moved[None, :]


def _refuse(case: OpCase) -> list[str]:
    return [] if case.dtype is torch.float32 else ['needs float32']


@round_columns.impl('cuda', when=_refuse)
def triton_round_columns(targets: Tensor, mixing: Tensor, scales: Tensor, zeros: Tensor | None, low: int, high: int,
                         held: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    count, outputs = targets.shape
    if count > _MOST:
        raise ValueError(f'a block has at most {_MOST} channels, not {count}')
    targets, scales = targets.contiguous(), scales.contiguous()
    mixing = mixing if mixing.stride(1) == 1 else mixing.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    held = None if held is None else held.contiguous()
    codes, change = torch.empty_like(targets, dtype=torch.int16), torch.empty_like(targets)
    _round_columns_kernel[(triton.cdiv(outputs, _OUTPUTS),)](
        targets, mixing, scales, zeros, held, codes, change, outputs, outputs, mixing.stride(0), float(low),
        float(high), float(_FAR),
        COUNT=count, BLOCK=triton.next_power_of_2(count), TILE=_OUTPUTS, ZEROS=zeros is not None,
        HELD=held is not None, num_warps=1,
    )  # fmt: skip
    return codes, change
