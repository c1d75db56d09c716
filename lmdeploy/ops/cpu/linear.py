"""Dense linear by oneDNN with a weight that was packed once, when it was loaded.

Packed products are about twice as fast as unpacked ones at the batch sizes of decoding, and from two rows on the bits
of a row do not depend on how many rows there are. Fewer than four rows are multiplied as four: that is stable too, and
faster than one alone, for which oneDNN has a kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPILOGUES = {'silu': ('swish', ''), 'gelu_tanh': ('gelu', 'tanh')}  # activation -> oneDNN's name and variant
_TYPICAL_ROWS = 16  # the batch that packing optimises its layout for
_FEWEST_ROWS = 4


@dataclass(slots=True)
class PackedWeight:
    """A weight ``[out, in]`` in oneDNN's own layout, and its bias."""

    weight: Tensor
    bias: Tensor | None


def pack(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """Pack ``weight [out, in]``, float32 or bfloat16."""
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS), bias)


def packed_linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """``x [T, in] @ W.T + bias``: ``[T, out]`` of x's dtype, which is the weight's."""
    rows = x.shape[0]
    if rows < _FEWEST_ROWS:
        return _multiply(_filled(x), packed, 'none', '')[:rows]
    return _multiply(x, packed, 'none', '')


def packed_gated(x: Tensor, gate: PackedWeight, up: PackedWeight, activation: str) -> Tensor:
    """``activation(x @ gate) * (x @ up)``, both steps done on the float32 sums before they are rounded.

    ``activation`` is a key of ``EPILOGUES``.
    """
    rows = x.shape[0]
    if rows < _FEWEST_ROWS:
        x = _filled(x)
    gated = _multiply(x, gate, *EPILOGUES[activation])
    return torch.ops.mkldnn._linear_pointwise.binary(x, gated, up.weight, up.bias, 'mul')[:rows]


def _filled(x: Tensor) -> Tensor:
    """``x`` with more rows, up to the fewest."""
    if x.shape[0] == 1:
        return x.expand(_FEWEST_ROWS, -1).contiguous()
    return torch.cat((x, x.new_zeros(_FEWEST_ROWS - x.shape[0], x.shape[1])))


def _multiply(x: Tensor, packed: PackedWeight, epilogue: str, algorithm: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, epilogue, [], algorithm)
