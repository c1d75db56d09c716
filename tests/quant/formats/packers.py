"""Writers of every format in plain Python integers and loops, straight from the definitions, for tests.

A :class:`Codes` is a quantised weight ``W [in, out] = (codes - zeros) * scales`` with codes and zero points from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Codes:
    """``codes [in, out]``, ``zeros`` and ``scales [groups, out]``; ``group_of[k]`` is the group of input k."""

    bits: int
    group: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group_of: list[int]

    @property
    def weight(self) -> Tensor:
        """``[out, in] float32``, one element after the other."""
        inputs, outputs = self.codes.shape
        weight = torch.empty(outputs, inputs)
        for k in range(inputs):
            g = self.group_of[k]
            weight[:, k] = (self.codes[k].float() - self.zeros[g].float()) * self.scales[g].float()
        return weight


def random_codes(inputs: int, outputs: int, bits: int, group: int, symmetric: bool, *, shuffled: bool = False,
                 least_zero: int = 0, scale_type: torch.dtype = torch.float16, seed: int = 0) -> Codes:
    """Random codes in groups of ``group`` inputs (0: one group), in an order of their own if ``shuffled``."""
    random = torch.Generator().manual_seed(seed)
    size = group or inputs
    groups = -(-inputs // size)
    zeros = torch.full((groups, outputs), 1 << bits - 1)
    if not symmetric:
        zeros = torch.randint(least_zero, 1 << bits, (groups, outputs), generator=random)
    group_of = torch.arange(inputs) // size
    if shuffled:
        group_of = group_of[torch.randperm(inputs, generator=random)]
    return Codes(bits, group, torch.randint(0, 1 << bits, (inputs, outputs), generator=random), zeros,
                 (torch.rand(groups, outputs, generator=random) / 16 + 0.01).to(scale_type), group_of.tolist())


def stream(codes: list[int], bits: int) -> list[int]:
    """Code k at bits ``k * bits`` of one long number, cut into signed 32-bit words."""
    number = sum(code << k * bits for k, code in enumerate(codes))
    return [signed(number >> 32 * i & 0xFFFFFFFF) for i in range(-(-len(codes) * bits // 32))]


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def columns(matrix: Tensor, bits: int) -> Tensor:
    """A stream down every column."""
    words = [stream(column, bits) for column in matrix.t().tolist()]
    return torch.tensor(words, dtype=torch.int32).t().contiguous()


def rows(matrix: Tensor, bits: int) -> Tensor:
    """A stream along every row."""
    return torch.tensor([stream(row, bits) for row in matrix.tolist()], dtype=torch.int32)


def awq_rows(matrix: Tensor) -> Tensor:
    words = [[signed(sum(row[at + AWQ_ORDER[i]] << 4 * i for i in range(8))) for at in range(0, len(row), 8)]
             for row in matrix.tolist()]
    return torch.tensor(words, dtype=torch.int32)


def awq(codes: Codes) -> dict[str, Tensor]:
    return {'qweight': awq_rows(codes.codes), 'qzeros': awq_rows(codes.zeros), 'scales': codes.scales}


def gptq(codes: Codes, version: int) -> dict[str, Tensor]:
    return {'qweight': columns(codes.codes, codes.bits), 'qzeros': rows(codes.zeros - int(version == 1), codes.bits),
            'scales': codes.scales, 'g_idx': torch.tensor(codes.group_of, dtype=torch.int32)}


def compressed(codes: Codes, symmetric: bool) -> dict[str, Tensor]:
    """pack-quantized; a scale for every output and group."""
    inputs, outputs = codes.codes.shape
    tensors = {'weight_packed': rows(codes.codes.t(), codes.bits), 'weight_scale': codes.scales.t().contiguous(),
               'weight_shape': torch.tensor([outputs, inputs])}
    if not symmetric:
        tensors['weight_zero_point'] = columns(codes.zeros.t(), codes.bits)
    if codes.group_of != sorted(codes.group_of):
        tensors['weight_g_idx'] = torch.tensor(codes.group_of, dtype=torch.int32)
    return tensors


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[out, in]`` int8 with one scale per output, ``[out, 1] float32``."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


def fp8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`int8_rows`, in float8_e4m3fn."""
    scales = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def fp8_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """float8 codes ``[out, in]``, a scale for every block, and the dequantised weight; block by block."""
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-outputs // block), -(-inputs // block))
    dense = torch.empty(outputs, inputs)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
            dense[at] = codes[at].float() * scales[i, j]
    return codes, scales, dense
