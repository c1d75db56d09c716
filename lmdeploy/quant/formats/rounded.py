"""Made-up weights as if they were stored quantised, so that speed can be measured without a model's files."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.formats.base import Layout, check_transform, load_bias, matrix_shape, scheme_of
from lmdeploy.quant.formats.dense import DenseFormat
from lmdeploy.quant.rounding import round_weight
from lmdeploy.weights.checkpoint import Prefix


@dataclass(frozen=True, slots=True)
class RoundedFormat:
    """A dense weight, rounded to the storage's codes when it loads. A stored scale of inputs is 1."""

    storage: Storage

    @property
    def name(self) -> str:
        return self.storage.format

    def detect(self, tensors: list[str]) -> bool:
        return 'weight' in tensors

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        layout = Layout(scheme_of(self.storage), *matrix_shape(prefix, 'weight'), self.storage.transform)
        return check_transform(prefix, layout, self.name)

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        weight = prefix.get('weight', (None, None))
        bundle = round_weight(weight, replace(self.storage, static=False))
        bundle.scheme, bundle.input_transform = scheme_of(self.storage), self.storage.transform
        bundle.bias = load_bias(prefix, weight.shape[0], dtype)
        if self.storage.static:
            bundle.input_scale = torch.ones((), device=weight.device)
        return bundle

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        return DenseFormat().save(replace(bundle, codes=None, weight=self.dequant(bundle)))

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return dequantize_bundle(bundle, torch.float32)
