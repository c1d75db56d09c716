"""KVCache: one pool of bytes, viewed as the pages of every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmdeploy.kv.format import KVFormat, format_of

PAGE = 64  # tokens per page: block sizes are multiples of it
_ALIGN = 64  # bytes of a cache line


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a model needs of a cache: its layers, the key heads of one of them, and the bits of a code, 0 for none."""

    num_layers: int
    kv_heads: int
    head_dim: int
    bits: int = 0

    def bytes_per_block(self, block_size: int, format: KVFormat) -> int:
        """Bytes that one block of ``block_size`` tokens takes in all layers together."""
        planes = format.tensors(block_size, self.kv_heads, self.head_dim).values()
        return self.num_layers * sum(plane.nbytes for plane in planes)


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's pages ``[blocks, kv_heads, block_size, head_dim]``, keys and values in planes of their own.

    Pages of codes (:class:`lmdeploy.kv.format.Codes`) have their scales and zeros in two planes more,
    ``[blocks, kv_heads, block_size, 2] float16``.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Of pages of codes: those of keys and of values."""
        assert self.k_scales is not None and self.v_scales is not None
        return self.k_scales, self.v_scales


class KVCache:
    """``num_blocks`` usable blocks, numbered from 1; block 0 is the null block that padding is written to.

    The pool starts as zeros and is only ever written with finite values, so that stale memory times a weight of zero
    is zero.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int = PAGE, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = 'cpu', format: KVFormat | None = None) -> None:
        if block_size <= 0 or block_size % PAGE:
            raise ValueError(f'block_size {block_size} is not a multiple of {PAGE}')
        self.shape, self.num_blocks, self.block_size = shape, num_blocks, block_size
        self.format = format or format_of(shape.bits, dtype)
        blocks = num_blocks + 1
        self.pool = _zeros(blocks * shape.bytes_per_block(block_size, self.format), torch.device(device))
        planes = self.format.tensors(block_size, shape.kv_heads, shape.head_dim)
        self._layers, start = [], 0
        for _ in range(shape.num_layers):
            views = {}
            for name, plane in planes.items():
                raw = self.pool[start : start + blocks * plane.nbytes]
                views[name] = raw.view(plane.dtype).view(blocks, *plane.shape)
                start += blocks * plane.nbytes
            self._layers.append(KVLayer(**views))

    @property
    def nbytes(self) -> int:
        return self.pool.numel()

    def layer(self, index: int) -> KVLayer:
        return self._layers[index]


def _zeros(nbytes: int, device: torch.device) -> Tensor:
    """``[nbytes] uint8``. On a CPU the system's own zero pages: memory is taken when a block is first written to."""
    if device.type != 'cpu':
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    pool = np.zeros(nbytes + _ALIGN, np.uint8)
    start = -pool.ctypes.data % _ALIGN
    return torch.from_numpy(pool[start : start + nbytes])
