"""Plain floating-point weights: ``weight [out, in]`` and an optional ``bias [out]``."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Prefix


class DenseFormat:
    """Loads any stored type as dense: block-quantised GGUF tensors are dequantised on the way."""

    name = 'dense'

    def detect(self, tensors: list[str]) -> bool:
        return 'weight' in tensors

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        weight = prefix.get('weight', (None, None), dtype)
        out_features, in_features = weight.shape
        bias = prefix.get('bias', (out_features,), dtype) if prefix.has('bias') else None
        scheme = dense_scheme(weight.element_size() * 8)
        return LinearBundle(scheme, out_features, in_features, weight=weight, bias=bias)

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        tensors = {'weight': bundle.stored}
        if bundle.bias is not None:
            tensors['bias'] = bundle.bias
        return tensors

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return bundle.stored
