"""Rounding to the nearest code: the plain way of quantising a weight, without data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.ops.quantize import LARGEST
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import scheme_of

LEAST_SCALE = 1e-7  # of a group of nothing but zeros


def round_weight(weight: Tensor, storage: Storage, scale_dtype: torch.dtype = torch.float32) -> LinearBundle:
    """Quantise ``weight [out, in]`` so that it can be stored as ``storage`` says; in float32, on its device.

    The extremes of every group become the extreme codes: the larger magnitude where symmetric and in float8, and where
    asymmetric both ends, with zero among them so that it stays exact. Codes fit the scales as they are stored.

    Raises:
        ValueError: ``storage.static``: the scale of inputs is something that data must tell.
    """
    if storage.static:
        raise ValueError('a stored scale of inputs needs data')
    outputs, inputs = weight.shape
    size = storage.group or inputs
    groups = -(-inputs // size)
    columns = F.pad(weight.to(torch.float32), (0, groups * size - inputs)).t().unflatten(0, (groups, size))
    high, low = columns.amax(1), columns.amin(1)  # [groups, out]
    zeros = None
    if storage.symmetric or storage.kind != 'int':
        limit = (1 << storage.bits - 1) - 1 if storage.kind == 'int' else LARGEST[storage.kind]
        scales = _shared(torch.maximum(high, -low), storage.rows) / limit
    else:
        top = (1 << storage.bits) - 1
        high, low = _shared(high.clamp(min=0), storage.rows), -_shared((-low).clamp(min=0), storage.rows)
        scales = (high - low) / top
    scales = scales.clamp_(min=max(LEAST_SCALE, torch.finfo(scale_dtype).tiny)).to(scale_dtype)
    steps = scales.to(torch.float32)
    scaled = columns / steps.unsqueeze(1)
    if storage.kind != 'int':
        codes = scaled.clamp(-LARGEST[storage.kind], LARGEST[storage.kind]).to(getattr(torch, storage.kind))
    elif storage.symmetric:
        half = 1 << storage.bits - 1
        codes = scaled.round().clamp(-half, half - 1).to(torch.int8)
    else:
        offsets = (-low / steps).round().clamp(storage.zero_shift, top)
        codes = (scaled.round() + offsets.unsqueeze(1)).clamp(0, top).to(torch.uint8)
        zeros = offsets.to(torch.int16)
    return LinearBundle(scheme_of(storage), outputs, inputs, codes=codes.flatten(0, 1)[:inputs], scales=scales,
                        zeros=zeros)  # fmt: skip


def _shared(values: Tensor, rows: int) -> Tensor:
    """``[groups, out]``: the largest of every ``rows`` outputs (0: of all), for each of them."""
    groups, outputs = values.shape
    rows = rows or outputs
    padded = F.pad(values, (0, -outputs % rows)).unflatten(1, (-1, rows))
    return padded.amax(2).repeat_interleave(rows, 1)[:, :outputs]
