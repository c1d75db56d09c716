"""Products with 8-bit weights, one scale for each output, on CPUs.

Inputs of 8 bits (``int8_product``): oneDNN multiplies the integers exactly. It wants unsigned inputs, so codes are
moved by 128, which it takes off again. Without VNNI it cuts sums of two products to 16 bits: ``features.int8_dot``.

Inputs in bfloat16 by integers (``wide_product``): a token's inputs become integers of 16 bits with a scale of their
own, that is, two rows of 8 bits, and the products of both are added. What is lost of an input is 1/65000 of the token's
largest one at most, less than bfloat16 loses of that one. All sums are of integers: a row's bits depend on it alone.

Inputs in bfloat16 as they are (``int8_linear``), without VNNI: torch's kernel for few rows; for many, tiles of codes in
bfloat16, which holds them exactly, and oneDNN. Both scale the sums, which are float32, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64  # tokens of a wide product at a time: its sums stay in the cache
FEW_ROWS = 12  # up to so many rows torch's kernel is faster
WIDTH = 16  # of which input channels must be a multiple: torch's kernel reads so many at once, the last ones as well
OUTPUTS = 4  # of which outputs must be
TILE = 1 << 19  # elements of a tile: 1 MiB of bfloat16
_FEWEST_ROWS = 4  # of a product of integers; fewer take longer
_MIDDLE = 128  # what turns signed codes into unsigned ones
_WIDE = 32512  # the largest integer of a wide product: 127 of its upper 8 bits, whose unit is 256
_LEAST = 1e-30  # what the largest input of a token counts as, at least


@dataclass(slots=True)
class Int8Weight:
    """A weight ``[out, in]`` for :func:`int8_linear`, widths padded by zeros.

    Attributes:
        codes: ``[padded_out, padded_in] int8``. scales: ``[padded_out] bfloat16``. bias: ``[out] bfloat16``.
        perm: ``[in] int64``: the layer multiplies ``x[..., perm]``.
    """

    codes: Tensor
    scales: Tensor
    out_features: int
    in_features: int
    bias: Tensor | None = None
    perm: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.codes, self.scales, self.bias, self.perm)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def rows(self, ids: Tensor) -> Tensor:
        """The weights ``[n, in] float32`` of the outputs ``ids [n]``."""
        rows = self.codes[ids, : self.in_features].float() * self.scales[ids].float().unsqueeze(1)
        return rows if self.perm is None else torch.empty_like(rows).index_copy_(1, self.perm, rows)


def pack_int8(codes: Tensor, scales: Tensor) -> Int8Weight:
    """Pack ``codes [out, in] int8``, in any memory order, with ``scales [out]``, which are rounded to bfloat16."""
    out_features, in_features = codes.shape
    codes = F.pad(codes, (0, -in_features % WIDTH, 0, -out_features % OUTPUTS)).contiguous()
    scales = F.pad(scales.to(torch.bfloat16), (0, -out_features % OUTPUTS))
    return Int8Weight(codes, scales, out_features, in_features)


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """``x [T, in] bfloat16`` times the weight, plus its bias: ``[T, out] bfloat16``."""
    if weight.perm is not None:
        x = x[:, weight.perm]
    if weight.codes.shape[1] != weight.in_features:
        x = F.pad(x, (0, weight.codes.shape[1] - weight.in_features))
    if x.shape[0] <= FEW_ROWS:
        y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight.codes, weight.scales)
        if y.shape[1] != weight.out_features:
            y = y[:, : weight.out_features].contiguous()
    else:
        y = _by_tiles(x, weight)
    return y if weight.bias is None else y.add_(weight.bias)


def _by_tiles(x: Tensor, weight: Int8Weight) -> Tensor:
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
    step = max(1, TILE // weight.codes.shape[1])
    for first in range(0, weight.out_features, step):
        part = slice(first, min(first + step, weight.out_features))
        torch.mul(F.linear(x, weight.codes[part].to(x.dtype)), weight.scales[part], out=out[:, part])
    return out


@dataclass(slots=True)
class Int8Product:
    """A weight ``[out, in]`` in oneDNN's layout for :func:`int8_product`, with ``scales [out] float32``."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 4 * self.scales.numel()


def pack_product(codes: Tensor, scales: Tensor) -> Int8Product:
    """Pack ``codes [out, in] int8`` with ``scales [out]``."""
    packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    return Int8Product(packed, scales.float(), torch.zeros(len(scales), dtype=torch.int32))


def int8_product(codes: Tensor, weight: Int8Product) -> Tensor:
    """``codes [T, in] int8`` times the weight and its scales: ``[T, out] float32``; the sums are exact."""
    rows = codes.shape[0]
    x = codes.view(torch.uint8) ^ _MIDDLE
    if rows < _FEWEST_ROWS:
        x = F.pad(x, (0, 0, 0, _FEWEST_ROWS - rows))
    return _multiply(x, weight)[:rows]


def wide_product(x: Tensor, weight: Int8Product) -> Tensor:
    """``x [T, in] bfloat16``, rounded to 16-bit integers, times the weight and its scales: ``[T, out] float32``."""
    rows = x.shape[0]
    if rows > ROWS:
        return torch.cat([wide_product(part, weight) for part in x.split(ROWS)])
    largest = x.abs().amax(1, keepdim=True).float().clamp_(min=_LEAST)
    whole = (x * (_WIDE / largest)).add_(257 * _MIDDLE + 0.5).to(torch.int32)  # both bytes moved; .to cuts
    both = torch.empty(2 * rows, x.shape[1], dtype=torch.uint8)
    both[:rows] = whole >> 8
    both[rows:] = whole  # its lower byte
    sums = _multiply(both, weight)
    return torch.add(sums[rows:], sums[:rows], alpha=256).mul_(largest / _WIDE)


def _multiply(codes: Tensor, weight: Int8Product) -> Tensor:
    """``codes [T, in] uint8``, less 128, times the weight and its scales: ``[T, out] float32``."""
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, _MIDDLE, weight.codes, weight.scales, weight.zeros, None, 1.0,
                                              0, torch.float32, 'none', [], '')  # fmt: skip
