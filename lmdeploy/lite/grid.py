"""Uniform grids: which scale and zero point a group of weights gets.

Weights lie as ``[in, out]``; scales and zero points as ``[groups, out]``, as in a
:class:`~lmdeploy.quant.bundle.LinearBundle`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import scheme_of

LEAST_SCALE = 1e-7  # of a group of nothing but zeros
ASYMMETRIC = tuple(1.0 - 0.02 * i for i in range(26))  # parts of the range between the extremes
SYMMETRIC = tuple(1.16 - 0.02 * i for i in range(34))  # parts of the scale that reaches the extreme: 8/7 for 4 bits
CHUNK = 1 << 22  # elements in float32 that a search looks at together


@dataclass(frozen=True, slots=True)
class Grid:
    """What can be chosen.

    Attributes:
        bits: of a code. group: input channels that share a scale; 0: all. symmetric: without zero points.
        least_zero: the smallest zero point that the format can store.
        scale_dtype: in which scales are stored.
    """

    bits: int
    group: int
    symmetric: bool
    least_zero: int = 0
    scale_dtype: torch.dtype = torch.float16

    @staticmethod
    def of(storage: Storage, scale_dtype: torch.dtype) -> Grid:
        if storage.kind != 'int' or storage.rows != 1:
            raise ValueError(f'{storage} is no grid of integers with scales of single outputs')
        return Grid(storage.bits, storage.group, storage.symmetric, storage.zero_shift, scale_dtype)

    @property
    def low(self) -> int:
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def high(self) -> int:
        return (1 << self.bits - 1) - 1 if self.symmetric else (1 << self.bits) - 1

    def groups(self, channels: int) -> int:
        return -(-channels // self.group) if self.group else 1

    def storable(self, scales: Tensor) -> Tensor:
        """Scales as they can be stored: never zero, of the stored type; the sign stays."""
        least = max(LEAST_SCALE, torch.finfo(self.scale_dtype).tiny)
        largest = torch.finfo(self.scale_dtype).max
        magnitude = scales.abs().clamp_(least, largest)
        return torch.where(scales < 0, -magnitude, magnitude).to(self.scale_dtype)

    def folded(self, columns: Tensor) -> Tensor:
        """``[in, out]`` to ``[groups, size, out]``; what the last group lacks repeats the last channel."""
        size = self.group or len(columns)
        groups = self.groups(len(columns))
        if (lack := groups * size - len(columns)) > 0:
            columns = torch.cat([columns, columns[-1:].expand(lack, *columns.shape[1:])])
        return columns.unflatten(0, (groups, size))


@dataclass(frozen=True, slots=True)
class Levels:
    """What was chosen: ``scales [groups, out]`` in the stored type, ``zeros [groups, out] int16`` (None: symmetric)."""

    scales: Tensor
    zeros: Tensor | None

    def of(self, channels: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points of ``channels [n]``, each ``[n, out] float32``."""
        groups = channels // grid.group if grid.group else torch.zeros_like(channels)
        return self.scales[groups].float(), None if self.zeros is None else self.zeros[groups].float()

    def steps(self, codes: Tensor, grid: Grid) -> Tensor:
        """``codes [in, out]`` less their zero points, ``float32``."""
        steps = codes.float()
        if self.zeros is not None:
            steps -= self._spread(self.zeros, len(codes), grid)
        return steps

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """The weights ``[in, out] float32`` that codes stand for."""
        return self.steps(codes, grid).mul_(self._spread(self.scales, len(codes), grid))

    def nearest(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest codes ``[in, out] int16``."""
        codes = weight.div(self._spread(self.scales, len(weight), grid)).round_()
        if self.zeros is not None:
            codes += self._spread(self.zeros, len(weight), grid)
        return codes.clamp_(grid.low, grid.high).to(torch.int16)

    def where(self, mask: Tensor, other: Levels) -> Levels:
        """These for the outputs of ``mask [out]``, ``other`` for the rest."""
        zeros = None
        if self.zeros is not None and other.zeros is not None:
            zeros = torch.where(mask, self.zeros, other.zeros)
        return Levels(torch.where(mask, self.scales, other.scales), zeros)

    def part(self, outputs: slice) -> Levels:
        """Those of some outputs."""
        return Levels(self.scales[:, outputs], None if self.zeros is None else self.zeros[:, outputs])

    @staticmethod
    def _spread(values: Tensor, channels: int, grid: Grid) -> Tensor:
        return values.float().repeat_interleave(grid.group or channels, 0)[:channels]


def extremes(weight: Tensor, grid: Grid) -> Levels:
    """The range of every group, zero in it, as the range of the codes.

    Symmetric: the larger magnitude becomes the largest code, ``2^(bits-1) - 1``, whatever its sign.
    """
    columns = grid.folded(weight)
    high, low = columns.amax(1).clamp_(min=0), columns.amin(1).clamp_(max=0)  # [groups, out]
    if grid.symmetric:
        return Levels(grid.storable(torch.maximum(high, -low) / grid.high), None)
    scales = grid.storable((high - low) / grid.high)
    zeros = (-low / scales.float()).round_().clamp_(grid.least_zero, grid.high)
    return Levels(scales, zeros.to(torch.int16))


def search(weight: Tensor, grid: Grid, importance: Tensor) -> Levels:
    """For every group of every output the scale and zero point with the least ``sum_j importance_j (w'_j - w_j)^2``.

    Asymmetric: parts of the full range, with the zero point of the extremes and its neighbours (all of them at 2 bits).
    Symmetric: the extreme becomes the outermost code, which is the negative one, so scales may be negative; and smaller
    scales that cut it off.

    Args:
        weight: ``[in, out] float32``. importance: ``[in] float32``.
    """
    outputs, step = weight.shape[1], max(1, CHUNK // len(weight))
    factors = grid.folded(importance[:, None])
    factors.view(-1, 1)[len(importance) :] = 0  # channels that the last group only repeats
    parts = [_search(grid.folded(weight[:, at : at + step]), grid, factors) for at in range(0, outputs, step)]
    zeros = None if grid.symmetric else torch.cat([zeros for _, zeros in parts if zeros is not None], 1)
    return Levels(torch.cat([scales for scales, _ in parts], 1), zeros)


def _search(columns: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """For ``columns [groups, size, out]``; ``importance [groups, size, 1]``."""
    high, low = columns.amax(1).clamp_(min=0), columns.amin(1).clamp_(max=0)
    least = torch.full_like(high, torch.inf)
    best_scale, best_zero = torch.ones_like(high), torch.zeros_like(high)

    def attempt(scales: Tensor, zeros: Tensor | None) -> None:
        nonlocal least, best_scale, best_zero
        scales = grid.storable(scales).float()
        codes = (columns / scales[:, None]).round_()
        if zeros is None:
            codes.clamp_(grid.low, grid.high)
        else:
            codes.clamp_((grid.low - zeros)[:, None], (grid.high - zeros)[:, None])
        error = codes.mul_(scales[:, None]).sub_(columns).square_().mul_(importance).sum(1)
        lower = error < least
        least = torch.where(lower, error, least)
        best_scale = torch.where(lower, scales, best_scale)
        if zeros is not None:
            best_zero = torch.where(lower, zeros, best_zero)

    if grid.symmetric:
        extreme = torch.where(-low > high, low, high)
        for part in SYMMETRIC:
            attempt(extreme * (part / grid.low), None)
        return best_scale.to(grid.scale_dtype), None
    for part in ASYMMETRIC:
        scales = (high - low) * (part / grid.high)
        below = -low / grid.storable(scales).float()
        lost = (1.0 - part) * grid.high / part  # steps that the smaller range lacks: above, on both sides or below
        for move in range(grid.least_zero, grid.high + 1) if grid.bits <= 2 else (0.0, 0.5 * lost, lost):
            zeros = torch.full_like(below, move) if grid.bits <= 2 else (below - move).round_()
            attempt(scales, zeros.clamp_(grid.least_zero, grid.high))
    return best_scale.to(grid.scale_dtype), best_zero.to(torch.int16)


def bundle_of(codes: Tensor, levels: Levels, storage: Storage, bias: Tensor | None = None) -> LinearBundle:
    """The bundle that stores ``codes [in, out]``."""
    kept = codes.to(torch.int8 if storage.symmetric else torch.uint8)
    return LinearBundle(scheme_of(storage), codes.shape[1], codes.shape[0], codes=kept, scales=levels.scales,
                        zeros=levels.zeros, bias=bias, input_transform=storage.transform)  # fmt: skip
