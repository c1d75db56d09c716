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
    """A storage of keys and values. ``tensors`` names the planes of a layer and gives one block's part of each."""

    @property
    def name(self) -> str: ...

    def tensors(self, block_size: int, kv_heads: int, head_dim: int) -> dict[str, TensorSpec]: ...


@dataclass(frozen=True, slots=True)
class Fp:
    """Floating point as it comes: planes ``k`` and ``v`` of ``[kv_heads, block_size, head_dim]``."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix('torch.')

    def tensors(self, block_size: int, kv_heads: int, head_dim: int) -> dict[str, TensorSpec]:
        spec = TensorSpec((kv_heads, block_size, head_dim), self.dtype)
        return {'k': spec, 'v': spec}
