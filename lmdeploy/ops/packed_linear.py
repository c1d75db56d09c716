"""Products with codes that are packed for a GPU: unpacked while they are multiplied, inputs in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.linear import GATE_GROUP
from lmdeploy.ops.quantize import TURN
from lmdeploy.ops.table import op

WIDTH = 32  # words of a tile's row
TILE = 64  # output channels of a tile
CODES = {2: 8, 3: 5, 4: 4, 5: 3, 6: 2, 7: 2, 8: 2}  # codes of so many bits in a word of 16
MAGIC = {torch.float16: 1024.0, torch.bfloat16: 128.0}  # a code below its exponent counts in units of one
FLOAT8 = {'float8_e4m3fn': torch.float8_e4m3fn, 'float8_e5m2': torch.float8_e5m2}
# a tile's rows and words as they lie in memory, so that 16 bytes are what one thread multiplies: [2, 4, 8] rows and
# [4, 4, 2] words, of which these axes are swapped
_ROWS, _WORDS = (2, 4, 8), (4, 4, 2)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight ``W [in, out] = (codes - zeros) * scales`` in tiles of TILE output channels.

    Word w of an output channel holds, from its low bits on, the codes of the input channels ``w // 32 * 32 c + i * 32 +
    w % 32`` for i below c, the codes of a word. Behind the last channel codes stand for zero.

    Attributes:
        words: ``[tiles, blocks, TILE, WIDTH] int16``, an even number of tiles; what is behind the last output channel
            counts for nothing.
        meta: ``[groups, out] int32``: in the low 16 bits those of the zero point, in ``dtype``, with MAGIC added
            (bfloat16 of 8 bits: without, and less 128), in the high ones those of the scale in ``scale_dtype``.
        bits: of a code. float8: name of the type of codes that are no integers, or ``''``.
        group: input channels that share a row of meta, a multiple of WIDTH; 0: all.
        zeros: whether zero points differ.
        dtype: float16 or bfloat16, the type of inputs.
        gated: output channels of two layers alternate in groups of GATE_GROUP.
    """

    words: Tensor
    meta: Tensor
    bias: Tensor | None
    bits: int
    float8: str
    group: int
    zeros: bool
    dtype: torch.dtype
    scale_dtype: torch.dtype
    out_features: int
    in_features: int
    gated: bool = False

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.meta.nbytes


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group: int,
         dtype: torch.dtype, *, float8: str = '', gated: bool = False) -> PackedWeight:  # fmt: skip
    """Lay out codes for :func:`packed_linear`.

    Args:
        codes: ``[in, out]``: int8 around zero, or uint8 with zero points; float8 where named.
        scales: ``[groups, out]``. zeros: ``[groups, out]``, or None.
        group: a multiple of WIDTH, or 0.
        dtype: of inputs.
    """
    inputs, outputs = codes.shape
    per_word = CODES[bits]
    block = WIDTH * per_word
    tiles, blocks = -(-outputs // TILE), -(-inputs // block)
    words = torch.empty(tiles + tiles % 2, blocks, TILE, WIDTH, dtype=torch.int16, device=codes.device)
    words[tiles:] = 0
    middle = 0 if float8 else 1 << bits - 1
    nothing = 0 if float8 or (bits == 8 and dtype is torch.bfloat16) else middle
    for tile in range(0, tiles, 64):  # a piece at a time: numbers of 32 bits take eight times the memory of codes
        part = codes[:, tile * TILE : (tile + 64) * TILE]
        part = part.view(torch.uint8).to(torch.int32)
        if not float8 and zeros is None:
            part = part + middle & (1 << bits) - 1
        if bits == 8 and not float8 and dtype is torch.bfloat16:
            part = part ^ 128
        count = -(-part.shape[1] // TILE)
        part = F.pad(part, (0, count * TILE - part.shape[1], 0, blocks * block - inputs), value=nothing)
        part = part.view(blocks, per_word, WIDTH, count, TILE)
        packed = torch.zeros(blocks, WIDTH, count, TILE, dtype=torch.int32, device=codes.device)
        for i in range(per_word):
            packed |= part[:, i] << i * bits
        packed = (packed << 16 >> 16).to(torch.int16).permute(2, 0, 3, 1)
        words[tile : tile + count] = _as_threads(packed)
    magic = MAGIC[dtype]
    if scales.dtype not in MAGIC:
        wide = scales.float().abs()
        scales = scales.to(torch.float16 if wide.max() < 6e4 and wide.min() > 6e-5 else torch.bfloat16)
    if zeros is None:
        shift = torch.full(scales.shape, float(middle), device=scales.device)
    else:
        shift = zeros.float()
    shift = shift - 128 if bits == 8 and dtype is torch.bfloat16 else shift + magic
    meta = torch.stack((shift.to(dtype).view(torch.int16), scales.contiguous().view(torch.int16)), -1)
    return PackedWeight(words, meta.view(torch.int32)[..., 0], bias, bits, float8, group, zeros is not None, dtype,
                        scales.dtype, outputs, inputs, gated)  # fmt: skip


def _as_threads(words: Tensor) -> Tensor:
    """``[..., TILE, WIDTH]`` words by channel in the order in which they lie in memory."""
    rows, columns = words.shape[-2:]
    split = words.reshape(*words.shape[:-2], _ROWS[1], _ROWS[0], _ROWS[2], _WORDS[0], _WORDS[1], _WORDS[2])
    n = words.ndim - 2
    swapped = split.permute(*range(n), n + 1, n, n + 2, n + 4, n + 3, n + 5)
    return swapped.reshape(*words.shape[:-2], rows, columns)


def _by_channel(words: Tensor) -> Tensor:
    """The inverse of :func:`_as_threads`."""
    split = words.reshape(*words.shape[:-2], *_ROWS, *_WORDS)
    n = words.ndim - 2
    return split.permute(*range(n), n + 1, n, n + 2, n + 4, n + 3, n + 5).reshape(words.shape)


def unpack(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``W.T [out, in]``, rounded once."""
    per_word, bits = CODES[packed.bits], packed.bits
    words = _by_channel(packed.words).permute(1, 3, 0, 2).to(torch.int32) & 0xFFFF  # [blocks, WIDTH, tiles, TILE]
    codes = torch.stack([words >> i * bits & (1 << bits) - 1 for i in range(per_word)], 1)
    codes = codes.flatten(3).flatten(0, 2)[: packed.in_features, : packed.out_features]
    halves = packed.meta.view(torch.int16).unflatten(1, (-1, 2))  # of a little-endian machine, as all GPUs' are
    scales = halves[..., 1].contiguous().view(packed.scale_dtype).float()
    if packed.float8:
        values = codes.to(torch.uint8).view(FLOAT8[packed.float8]).float()
    else:
        signed = bits == 8 and packed.dtype is torch.bfloat16
        zeros = halves[..., 0].contiguous().view(packed.dtype).float() - (0 if signed else MAGIC[packed.dtype])
        values = (codes ^ 128) - 128 if signed else codes
        values = values.float() - _spread(zeros, packed)
    return (values * _spread(scales, packed)).t().to(dtype)


def _spread(rows: Tensor, packed: PackedWeight) -> Tensor:
    return rows.repeat_interleave(packed.group or packed.in_features, 0)[: packed.in_features]


@op
def packed_linear(x: Tensor, packed: PackedWeight, activation: str, exact: bool) -> Tensor:
    """``x @ W + bias`` for ``x [T, in]`` of 16 bits; of gated layers ``activation(gate) * up``.

    Args:
        activation: a key of ``ACTIVATIONS`` where ``packed.gated``, else ``''``.
        exact: give float32.

    Returns:
        ``[T, out]``, or ``[T, out / 2]`` where gated.
    """
    y = x.float() @ unpack(packed, torch.float32).t()
    return _finish(y, packed, activation).to(torch.float32 if exact else x.dtype)


@op
def packed_codes_linear(codes: Tensor, scales: Tensor, packed: PackedWeight, activation: str,
                        dtype: torch.dtype) -> Tensor:  # fmt: skip
    """As :func:`packed_linear`, for inputs of 8 bits: what shares a scale is summed in integers, or of float8 as such.

    Args:
        codes: ``[T, in]`` int8 or float8, in the order of ``quantize_tokens(..., turned=True)``.
        scales: ``[T, 1] float32``.
        packed: integers of 4 bits in groups of a multiple of 128, or codes of 8 bits of the inputs' type with one scale
            a channel; ``in`` is a multiple of 16.
        dtype: of the result.
    """
    order = torch.tensor(TURN, device=codes.device).argsort()
    x = codes.view(torch.uint8).unflatten(-1, (-1, 16))[..., order].flatten(-2).view(codes.dtype).float() * scales
    return _finish(x @ unpack(packed, torch.float32).t(), packed, activation).to(dtype)


def _finish(y: Tensor, packed: PackedWeight, activation: str) -> Tensor:
    if packed.bias is not None:
        y += packed.bias.float()
    if packed.gated:
        both = y.unflatten(-1, (-1, 2, GATE_GROUP))
        y = ACTIVATIONS[activation](torch.cat((both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2)), -1))
    return y
