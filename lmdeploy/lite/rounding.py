"""Rounding weights to the nearest code, group by group, with ranges that may be narrower than the extremes.

The arithmetic of :func:`lmdeploy.quant.rounding.round_weight` along rows, fast enough to be tried a hundred times on a
layer, and the errors of outputs by which trials are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.lite.recipe import SiteStatistics
from lmdeploy.ops.quantize import LARGEST
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import scheme_of
from lmdeploy.quant.rounding import LEAST_SCALE

LOSS_TOKENS = 1024  # of a sample
SCALES = torch.float16  # of integer codes in groups, as they are stored


@dataclass(frozen=True, slots=True)
class Grid:
    """The codes that every group of a weight can have.

    Attributes:
        scales: ``[out, groups]``. zeros: ``[out, groups] float32``, whole numbers; None where symmetric or float8.
    """

    storage: Storage
    scales: Tensor
    zeros: Tensor | None


def make_grid(weight: Tensor, storage: Storage, shrink: Tensor | None = None) -> Grid:
    """Scales and zero points by the extremes of every group of ``weight [out, in]``, times ``shrink [out, groups]``."""
    groups = _groups(weight, storage)
    high, low = groups.amax(2), groups.amin(2)
    if shrink is not None:
        high, low = high * shrink, low * shrink
    top, zeros = (1 << storage.bits) - 1, None
    integers = storage.kind == 'int'
    least = LEAST_SCALE
    if storage.symmetric or not integers:
        limit = (1 << storage.bits - 1) - 1 if integers else LARGEST[storage.kind]
        scales = torch.maximum(high, -low) / limit
    else:
        high, low = high.clamp(min=0), low.clamp(max=0)
        scales = (high - low) / top
    if storage.group:
        scales = scales.clamp(min=max(least, torch.finfo(SCALES).tiny)).to(SCALES)
    else:
        scales = scales.clamp(min=least)
    if integers and not storage.symmetric:
        zeros = (-low / scales.float()).round().clamp(storage.zero_shift, top)
    return Grid(storage, scales, zeros)


def codes_of(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest codes ``[out, in]``: int8 around zero, uint8 with zero points, or float8."""
    storage = grid.storage
    scaled = _groups(weight, storage) / grid.scales.float().unsqueeze(2)
    if storage.kind != 'int':
        limit = LARGEST[storage.kind]
        return scaled.clamp(-limit, limit).to(getattr(torch, storage.kind)).flatten(1)
    if grid.zeros is None:
        half = 1 << storage.bits - 1
        return scaled.round().clamp(-half, half - 1).to(torch.int8).flatten(1)
    return (scaled.round() + grid.zeros.unsqueeze(2)).clamp(0, (1 << storage.bits) - 1).to(torch.uint8).flatten(1)


def values_of(codes: Tensor, grid: Grid) -> Tensor:
    """What codes stand for: ``[out, in] float32``."""
    groups = _groups(codes.float(), grid.storage)
    if grid.zeros is not None:
        groups = groups - grid.zeros.unsqueeze(2)
    return (groups * grid.scales.float().unsqueeze(2)).flatten(1)


def rounded(weight: Tensor, storage: Storage, shrink: Tensor | None = None) -> Tensor:
    """``weight`` on its grid: ``[out, in] float32``."""
    grid = make_grid(weight, storage, shrink)
    return values_of(codes_of(weight, grid), grid)


def bundle_of(codes: Tensor, grid: Grid) -> LinearBundle:
    """The bundle of ``codes [out, in]``."""
    out_features, in_features = codes.shape
    zeros = None if grid.zeros is None else grid.zeros.t().to(torch.int16).contiguous()
    return LinearBundle(scheme_of(grid.storage), out_features, in_features, codes=codes.t(),
                        scales=grid.scales.t().contiguous(), zeros=zeros)  # fmt: skip


def output_loss(delta: Tensor, weight: Tensor, statistics: SiteStatistics) -> float:
    """``E|delta x|^2 / E|weight x|^2``: by the hessian if there is one, else over LOSS_TOKENS tokens of the sample."""
    hessian, sample = statistics.hessian, statistics.sample
    if hessian is not None:
        if not statistics.energy:
            statistics.energy = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
        return float(((delta @ hessian) * delta).sum(dtype=torch.float64)) / max(statistics.energy, 1e-30)
    assert sample is not None
    sample = sample[:: max(1, len(sample) // LOSS_TOKENS)]
    if not statistics.energy:
        statistics.energy = float((sample @ weight.t()).square_().sum(dtype=torch.float64))
    return float((sample @ delta.t()).square_().sum(dtype=torch.float64)) / max(statistics.energy, 1e-30)


def sketch(sample: Tensor, width: int, seed: int) -> Tensor:
    """``[in, width]`` with about the second moments of ``sample [tokens, in]``: random signed sums of its tokens.

    ``E |D S|^2 = tr(D H D^T)`` with H the sample's mean of ``x xT`` (Hutchinson's estimate), at the cost of ``width``
    tokens instead of all.
    """
    tokens = sample.shape[0]
    if tokens <= width:
        return (sample / max(tokens, 1) ** 0.5).t().contiguous()
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (tokens, width), generator=generator).mul_(2).sub_(1).float().to(sample.device)
    return sample.t() @ signs / (tokens * width) ** 0.5


def _groups(weight: Tensor, storage: Storage) -> Tensor:
    """``[out, groups, group]``."""
    return weight.unflatten(1, (-1, storage.group or weight.shape[1]))
