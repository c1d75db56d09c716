"""KVFormat: how one token's keys and values are stored in a page of the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and type of one plane of one block."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class KVFormat(Protocol):
    """A storage of keys and values. ``tensors`` names the planes of a layer and gives one block's part of each.

    Attributes:
        bits: of a code; 0: what is stored are numbers, not codes.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    def tensors(self, block_size: int, kv_heads: int, head_dim: int) -> dict[str, TensorSpec]: ...


@dataclass(frozen=True, slots=True)
class Fp:
    """Floating point as it comes: planes ``k`` and ``v`` of ``[kv_heads, block_size, head_dim]``."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix('torch.')

    @property
    def bits(self) -> int:
        return 0

    def tensors(self, block_size: int, kv_heads: int, head_dim: int) -> dict[str, TensorSpec]:
        spec = TensorSpec((kv_heads, block_size, head_dim), self.dtype)
        return {'k': spec, 'v': spec}


@dataclass(frozen=True, slots=True)
class Codes:
    """Signed integers of ``bits`` (8 or 4), with a scale and a zero for every token and head beside them.

    The number behind code c is ``c * scale + zero``. Planes ``k`` and ``v`` are ``[kv_heads, block_size, D * bits / 8]
    int8``; a byte of two codes holds channel i in its low half and channel ``i + D / 2`` in its high half, each plus 8.
    Planes ``k_scales`` and ``v_scales`` are ``[kv_heads, block_size, 2] float16``: scale, zero.
    """

    bits: int

    @property
    def name(self) -> str:
        return f'int{self.bits}'

    def tensors(self, block_size: int, kv_heads: int, head_dim: int) -> dict[str, TensorSpec]:
        codes = TensorSpec((kv_heads, block_size, head_dim * self.bits // 8), torch.int8)
        scales = TensorSpec((kv_heads, block_size, 2), torch.float16)
        return {'k': codes, 'v': codes, 'k_scales': scales, 'v_scales': scales}


def format_of(bits: int, dtype: torch.dtype) -> KVFormat:
    """The format for ``quant_policy`` ``bits``: 8 or 4; 0 is ``dtype`` itself."""
    return Codes(bits) if bits else Fp(dtype)
