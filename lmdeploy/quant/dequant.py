"""From a bundle of any scheme to the dense weight that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.weights.dequant import BLOCK_TYPES, dequantize

CHUNK = 1 << 22  # elements that lie in memory as float32 at a time


def dequantize_bundle(bundle: LinearBundle, dtype: torch.dtype) -> Tensor:
    """``W.T [out, in]`` with channels in the order of x: ``(codes - zeros) * scales``, rounded to ``dtype`` once."""
    if bundle.weight is not None:
        return bundle.weight.to(dtype)
    codes = bundle.stored
    if bundle.scheme.name in BLOCK_TYPES:
        return dequantize(codes, bundle.scheme.name, dtype)
    assert bundle.scales is not None
    out = torch.empty(bundle.out_features, bundle.in_features, dtype=dtype, device=codes.device)
    group = bundle.scheme.group or bundle.in_features
    step = max(1, CHUNK // max(1, bundle.in_features))
    for start in range(0, bundle.out_features, step):
        part = slice(start, start + step)
        weight = codes[:, part].t().to(torch.float32)
        if bundle.zeros is not None:
            weight -= _spread(bundle.zeros[:, part], group, bundle.in_features)
        weight *= _spread(bundle.scales[:, part], group, bundle.in_features)
        if bundle.perm is None:
            out[part] = weight
        else:
            out[part, bundle.perm] = weight.to(dtype)
    return out


def _spread(values: Tensor, group: int, in_features: int) -> Tensor:
    """``[groups, n]`` to ``[n, in] float32``, one for each channel."""
    return values.t().to(torch.float32).repeat_interleave(group, 1)[:, :in_features]
