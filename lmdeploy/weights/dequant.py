"""Dequantisation of GGUF block types to floating point, bit-equal to the reference arithmetic in float32.

A block is a run of 32 or 256 neighbouring elements of one row: small integer codes beside the float16 scales (and
minima) that turn them into numbers. All functions here take blocks ``[n, bytes] uint8`` and return ``[n, elements]
float32``. Every step is an exact conversion or one correctly rounded float32 operation in the order that ggml defines,
so results do not depend on threads or chunks.

Notation: d = scale, m = minimum, sc = integer sub-scale, q = codes, lo/hi = the halves of a split code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmdeploy.weights.gguf import TYPES

CHUNK_ELEMENTS = 1 << 15  # small enough for the cache, and for torch to run each step in the calling thread


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte ``start`` of each block, as ``[n, 1] float32``."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """``[n, k, w]`` bytes to ``[n, k, 2, w]``: all low nibbles of a run of w bytes, then all high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=2)


def _five(low: Tensor, high: Tensor) -> Tensor:
    """Codes ``[n, 32] int32`` of 5 bits from ``[n, 16]`` bytes of nibbles and ``[n, 4]`` bytes of highest bits."""
    words = high.clone(memory_format=torch.contiguous_format).view(torch.int32)  # a copy is aligned
    bits = words >> torch.arange(32, dtype=torch.int32)
    return bits.bitwise_and_(1).mul_(16).add_(torch.cat((low & 15, low >> 4), dim=1))


def _q4_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, None, 2:18]).flatten(1)
    return codes.float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, None, 4:20]).flatten(1)
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _five(blocks[:, 6:22], blocks[:, 2:6])
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _five(blocks[:, 8:24], blocks[:, 4:8])
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:34].view(torch.int8).float().mul_(_half(blocks, 0))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit sub-scales and sub-minima in bytes 4 to 16, times d and dmin: two ``[n, 8, 1] float32``.

    The first eight bytes hold the low six bits of entries 0 to 3 and, above them, the top two bits of entries 4 to 7;
    the last four bytes hold the low nibbles of entries 4 to 7, scale low and minimum high.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1)
    return scales.float().mul_(_half(blocks, 0)).unsqueeze(-1), minima.float().mul_(_half(blocks, 2)).unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[:, 16:144].unflatten(1, (4, 32))).flatten(1, 2)
    return codes.float().mul_(scales).sub_(minima).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    low = _nibbles(blocks[:, 48:176].unflatten(1, (4, 32))).flatten(1, 2)
    shifts = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
    high = (blocks[:, None, 16:48] >> shifts) & 1  # bit i of byte j belongs to element j of sub-block i
    return (low | (high << 4)).float().mul_(scales).sub_(minima).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208)).unsqueeze(-1)
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    high = ((blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3).view(-1, 8, 32)
    codes = (low | (high << 4)).view(-1, 16, 16)
    return codes.float().sub_(32).mul_(scales).flatten(1)


BLOCK_TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    'Q4_0': _q4_0,
    'Q4_1': _q4_1,
    'Q5_0': _q5_0,
    'Q5_1': _q5_1,
    'Q8_0': _q8_0,
    'Q4_K': _q4_k,
    'Q5_K': _q5_k,
    'Q6_K': _q6_k,
}
FOUR_BITS = frozenset({'Q4_0', 'Q4_1', 'Q4_K'})  # those that :func:`nibbles` takes apart
BLOCK_SIZES = {name: (elements, nbytes) for name, elements, nbytes in TYPES.values()}


def dequantize_into(blocks: Tensor, dtype_name: str, out: Tensor) -> None:
    """Dequantise into ``out`` piece by piece, so that the memory used beyond ``out`` is a few MiB.

    Args:
        blocks: ``[..., row_bytes] uint8``, contiguous.
        dtype_name: a key of :data:`BLOCK_TYPES`.
        out: contiguous, as many elements as the blocks hold; values are rounded from float32 to its type.
    """
    elements, nbytes = BLOCK_SIZES[dtype_name]
    unpack = BLOCK_TYPES[dtype_name]
    blocks, flat = blocks.view(-1, nbytes), out.view(-1, elements)
    step = CHUNK_ELEMENTS // elements
    for start in range(0, len(blocks), step):
        flat[start : start + step] = unpack(blocks[start : start + step])


def dequantize(blocks: Tensor, dtype_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks ``[..., row_bytes] uint8`` to ``[..., row_elements]`` of ``dtype``."""
    elements, nbytes = BLOCK_SIZES[dtype_name]
    out = torch.empty(*blocks.shape[:-1], blocks.shape[-1] // nbytes * elements, dtype=dtype)
    dequantize_into(blocks.contiguous(), dtype_name, out)
    return out


def nibbles(blocks: Tensor, dtype_name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers in blocks of 4-bit codes: ``weight = code * scale - minimum``, for every 32 elements of a row.

    Args:
        blocks: ``[n, row_bytes] uint8``. dtype_name: one of :data:`FOUR_BITS`.

    Returns:
        codes ``[n, row] uint8`` from 0 to 15, scales and minima ``[n, row / 32] float32``.
    """
    rows = len(blocks)
    blocks = blocks.reshape(-1, BLOCK_SIZES[dtype_name][1])
    if dtype_name == 'Q4_K':
        scales, minima = _scales_and_minima(blocks)
        codes = _nibbles(blocks[:, 16:144].unflatten(1, (4, 32)))
    elif dtype_name == 'Q4_1':
        scales, minima = _half(blocks, 0), -_half(blocks, 2)
        codes = _nibbles(blocks[:, None, 4:20])
    else:
        scales = _half(blocks, 0)
        minima = 8 * scales
        codes = _nibbles(blocks[:, None, 2:18])
    return codes.reshape(rows, -1), scales.reshape(rows, -1), minima.reshape(rows, -1)
