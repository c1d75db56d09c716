"""Plain floating-point weights: ``weight [out, in]`` and an optional ``bias [out]``."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import Layout, load_bias, matrix_shape, with_bias
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Prefix


class DenseFormat:
    """Loads any stored type as dense: block-quantised GGUF tensors are dequantised on the way."""

    name = 'dense'

    def detect(self, tensors: list[str]) -> bool:
        return 'weight' in tensors

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        return Layout(dense_scheme(dtype.itemsize * 8), *matrix_shape(prefix, 'weight'))

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        weight = prefix.get('weight', (None, None), dtype)
        out_features, in_features = weight.shape
        scheme = dense_scheme(weight.element_size() * 8)
        return LinearBundle(scheme, out_features, in_features, weight=weight,
                            bias=load_bias(prefix, out_features, dtype))  # fmt: skip

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        return with_bias({'weight': bundle.stored}, bundle)

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return bundle.stored
