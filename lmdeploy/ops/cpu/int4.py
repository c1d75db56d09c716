"""Products with 4-bit weights in groups, on CPUs: torch's packed kernel for few rows, tiles in bfloat16 for many.

``W[n, k] = (code[n, k] - 8) * scale[n, g] + offset[n, g]`` where g is the group of k: symmetric codes have no offsets,
zero points give ``offset = (8 - zero) * scale``, and formats with minima any number.

Few rows: torch keeps scales and offsets in bfloat16, and multiplies and sums in float32; a row's bits depend neither
on the other rows nor on how many there are. Its time grows with the rows: every four of them unpack the weight again.
Many rows: a tile of the weight that fits the cache is unpacked, rounded to bfloat16 and multiplied by oneDNN; the
weight as a whole is never there. The two ways round differently.

torch's layout depends on the instruction set, so it is looked up by packing a pattern.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # outputs are padded to a multiple: torch packs 64, 32 or 16 of them together
GROUPS = (256, 128, 64, 32)  # the sizes of groups that torch multiplies
FEW_ROWS = 48  # up to so many rows, unpacking the weight for every four of them is faster
TILE = 1 << 19  # elements of a tile: 1 MiB of bfloat16
_PACKED_AT_ONCE = 1 << 22  # codes that are packed at a time: torch wants them as int32


@dataclass(slots=True)
class Int4Weight:
    """A weight ``[out, in]`` for :func:`int4_linear`, widths padded by zeros to ``padded_out`` and ``padded_in``.

    Attributes:
        codes: ``[padded_out, padded_in / 2] uint8`` in torch's layout. scales: ``[groups, padded_out, 2] bfloat16``,
            scale and offset.
        group: input channels of a group, one of GROUPS. bias: ``[out] bfloat16``. perm: ``[in] int64``: the layer
            multiplies ``x[..., perm]``.
    """

    codes: Tensor
    scales: Tensor
    group: int
    out_features: int
    in_features: int
    bias: Tensor | None = None
    perm: Tensor | None = None

    @property
    def padded_in(self) -> int:
        return self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.codes, self.scales, self.bias, self.perm)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def group_for(group: int, in_features: int) -> int:
    """The size of GROUPS in which groups of ``group`` channels can be had by repeating scales; 0: none.

    ``group`` 0 means all channels, ``in_features`` 0 any number of them.
    """
    if not group or 0 < in_features <= group:
        return next((size for size in GROUPS if in_features % size == 0), GROUPS[-1])
    return next((size for size in GROUPS if group % size == 0), 0)


def pack_int4(codes: Tensor, scales: Tensor, offsets: Tensor | None, group: int) -> Int4Weight:
    """Pack a weight; see the module for what the numbers mean.

    Args:
        codes: ``[out, in] uint8``, 0 to 15, in any memory order. scales: ``[groups, out]``. offsets: the same, or None.
        group: input channels that share a scale, 0 for all; :func:`group_for` must know it.

    Raises:
        ValueError: groups of a size that cannot be had.
    """
    out_features, in_features = codes.shape
    size = group_for(group, in_features)
    if not size:
        raise ValueError(f'groups of {group} are no multiple of {GROUPS[-1]}')
    padded_out, padded_in = -(-out_features // BLOCK) * BLOCK, -(-in_features // size) * size
    packed = torch.empty(padded_out, padded_in // 2, dtype=torch.uint8)
    step = max(1, _PACKED_AT_ONCE // padded_in // BLOCK) * BLOCK
    for start in range(0, padded_out, step):
        part = codes[start : start + step].to(torch.int32)
        rows = min(step, padded_out - start)
        part = F.pad(part, (0, padded_in - in_features, 0, rows - part.shape[0]))
        packed[start : start + rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1)
    both = torch.zeros(padded_in // size, padded_out, 2, dtype=torch.bfloat16)
    both[:, :out_features, 0] = _repeated(scales, group or in_features, size, both.shape[0])
    if offsets is not None:
        both[:, :out_features, 1] = _repeated(offsets, group or in_features, size, both.shape[0])
    return Int4Weight(packed, both, size, out_features, in_features)


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    """``x [T, in] bfloat16`` times the weight, plus its bias: ``[T, out] bfloat16``."""
    if weight.perm is not None:
        x = x[:, weight.perm]
    if weight.padded_in != weight.in_features:
        x = F.pad(x, (0, weight.padded_in - weight.in_features))
    if x.shape[0] <= FEW_ROWS:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight.codes, weight.group, weight.scales)
    else:
        y = _by_tiles(x, weight)
    if y.shape[1] != weight.out_features:
        y = y[:, : weight.out_features].contiguous()
    return y if weight.bias is None else y.add_(weight.bias)


def unpack_int4(weight: Int4Weight) -> Tensor:
    """``W.T [padded_in, padded_out] bfloat16``, inputs in the order in which they are packed."""
    return _Tiles(weight, weight.codes.shape[0])(0, weight.codes.shape[0])


def _by_tiles(x: Tensor, weight: Int4Weight) -> Tensor:
    """``[T, padded_out]``, without the bias."""
    padded_out = weight.codes.shape[0]
    out = torch.empty(x.shape[0], padded_out, dtype=x.dtype)
    step = min(max(1, TILE // weight.padded_in // BLOCK) * BLOCK, padded_out)
    tiles = _Tiles(weight, step)
    for first in range(0, padded_out, step):
        last = min(first + step, padded_out)
        torch.mm(x, tiles(first, last), out=out[:, first:last])
    return out


class _Tiles:
    """Unpacks some outputs of a weight after the other, in the same memory: new pages cost as much as the work."""

    def __init__(self, weight: Int4Weight, most: int) -> None:
        self.weight, self.layout = weight, _layout()
        size = most * weight.padded_in
        self.nibbles = torch.empty(size // 2, dtype=torch.uint8)
        self.numbers = torch.empty(size)  # float32 takes half the time of bfloat16
        self.tile = torch.empty(size, dtype=torch.bfloat16)

    def __call__(self, first: int, last: int) -> Tensor:
        """``[padded_in, last - first]`` of the outputs from ``first`` to ``last``, multiples of BLOCK."""
        weight, block, order = self.weight, self.layout.block, self.layout.order
        padded_in, blocks, half = weight.padded_in, (last - first) // block, block // 2
        groups, size = padded_in // weight.group, padded_in * (last - first)
        both = weight.scales[:, first:last].float().view(groups, blocks, block, 2).permute(3, 1, 0, 2).unsqueeze(3)
        scales, offsets = both.contiguous()  # [blocks, groups, 1, block]
        codes = weight.codes[first:last].view(blocks, padded_in, half)
        nibbles = self.nibbles[: size // 2].view(blocks, padded_in, half)
        numbers = self.numbers[:size].view(blocks, padded_in, 2, half)
        numbers[:, :, 0] = torch.bitwise_and(codes, 15, out=nibbles)
        numbers[:, :, 1] = torch.bitwise_right_shift(codes, 4, out=nibbles)
        numbers = numbers.view(blocks, groups, weight.group, block)
        if order is not None:
            numbers = numbers[..., order]
        torch.addcmul(offsets.sub_(scales, alpha=8), numbers, scales, out=numbers)
        tile = self.tile[:size].view(padded_in, blocks, block)
        tile.copy_(numbers.view(blocks, padded_in, block).transpose(0, 1))
        return tile.view(padded_in, last - first)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How torch packs here: ``block`` outputs lie together, for each input channel in ``block / 2`` bytes.

    ``order [block]`` tells where, among all low nibbles of these bytes and then all high ones, each output lies; None:
    in their order.
    """

    block: int
    order: Tensor | None


@functools.cache
def _layout() -> _Layout:
    outputs = torch.arange(BLOCK, dtype=torch.int32).unsqueeze(1).expand(BLOCK, GROUPS[-1])
    low, high = (_packed((outputs >> shift) & 15) for shift in (0, 4))
    numbers = [low & 15 | (high & 15) << 4, low >> 4 | high & 240]  # the outputs in the low and in the high nibbles
    one = torch.zeros(BLOCK, GROUPS[-1], dtype=torch.int32)
    one[:, 0] = 1
    block = 2 * int((_packed(one) == 0).int().argmax())  # the bytes of channel 1 follow those of channel 0
    found = torch.cat([n[: block // 2] for n in numbers]).long()
    order = found.argsort()
    return _Layout(block, None if torch.equal(order, torch.arange(block)) else order)


def _packed(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1).flatten()


def _repeated(values: Tensor, group: int, size: int, rows: int) -> Tensor:
    """``[groups, out]`` for groups of ``group``, as rows for groups of ``size``; those beyond are zero."""
    values = values.repeat_interleave(-(-group // size), 0)[:rows].to(torch.bfloat16)
    return F.pad(values, (0, 0, 0, rows - values.shape[0]))
