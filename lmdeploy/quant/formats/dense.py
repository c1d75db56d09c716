"""Plain floating-point weights: ``weight [out, in]`` and an optional ``bias [out]``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import Layout, check_transform, load_bias, matrix_shape, with_bias
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Prefix


@dataclass(frozen=True, slots=True)
class DenseFormat:
    """Loads any stored type as dense: block-quantised GGUF tensors are dequantised on the way.

    Attributes:
        transform: what is done to inputs, see :attr:`lmdeploy.config.quantization.Storage.transform`.
    """

    transform: str = ''

    @property
    def name(self) -> str:
        return 'dense'

    def detect(self, tensors: list[str]) -> bool:
        return 'weight' in tensors

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        layout = Layout(dense_scheme(dtype.itemsize * 8), *matrix_shape(prefix, 'weight'), self.transform)
        return check_transform(prefix, layout, self.name)

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        weight = prefix.get('weight', (None, None), dtype)
        out_features, in_features = weight.shape
        scheme = dense_scheme(weight.element_size() * 8)
        return LinearBundle(scheme, out_features, in_features, weight=weight,
                            bias=load_bias(prefix, out_features, dtype), input_transform=self.transform)  # fmt: skip

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        return with_bias({'weight': bundle.stored}, bundle)

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return bundle.stored
