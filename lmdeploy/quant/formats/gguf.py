"""GGUF blocks kept as they are: the compact form, for kernels that unpack while they multiply.

A layer of a GGUF file is called ``weight`` whatever its type, so names alone do not tell blocks from dense weights:
ask :func:`holds_blocks`. (:class:`~lmdeploy.quant.formats.dense.DenseFormat` loads the same layers dequantised.)
Saved into safetensors, the tensor is called by its block type in lower case (``q4_k``) and holds the blocks as bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import Layout, load_bias, matrix_shape, with_bias
from lmdeploy.quant.scheme import QuantScheme
from lmdeploy.weights.checkpoint import Prefix
from lmdeploy.weights.dequant import BLOCK_SIZES, BLOCK_TYPES, dequantize

SCHEMES: dict[str, QuantScheme] = {
    'Q4_0': QuantScheme('Q4_0', 4, 32, symmetric=True),
    'Q4_1': QuantScheme('Q4_1', 4, 32, symmetric=False),
    'Q5_0': QuantScheme('Q5_0', 5, 32, symmetric=True),
    'Q5_1': QuantScheme('Q5_1', 5, 32, symmetric=False),
    'Q8_0': QuantScheme('Q8_0', 8, 32, symmetric=True),
    'Q4_K': QuantScheme('Q4_K', 4, 32, symmetric=False),
    'Q5_K': QuantScheme('Q5_K', 5, 32, symmetric=False),
    'Q6_K': QuantScheme('Q6_K', 6, 16, symmetric=True),
}


def holds_blocks(prefix: Prefix) -> bool:
    """Whether the layer's weight in its file is block-quantised."""
    tensors = prefix.tensors()
    return 'weight' in tensors and prefix.dtype_name('weight') in BLOCK_TYPES


class GGUFFormat:
    """Blocks ``[out, row_bytes] uint8`` of one GGUF type, and an optional bias."""

    name = 'gguf'

    def detect(self, tensors: list[str]) -> bool:
        return any(name.upper() in BLOCK_TYPES for name in tensors)

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        name = self._tensor(prefix)
        if name == 'weight':
            out_features, in_features = matrix_shape(prefix, name)
            return Layout(SCHEMES[prefix.dtype_name(name)], out_features, in_features)
        elements, nbytes = BLOCK_SIZES[name.upper()]
        out_features, row_bytes = prefix.shape(name)
        return Layout(SCHEMES[name.upper()], out_features, row_bytes // nbytes * elements)

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        """As in the protocol. The blocks must be those of a layer for which :func:`holds_blocks` or detect is true."""
        layout = self.describe(prefix, dtype)
        data = prefix.raw(self._tensor(prefix)).data
        return LinearBundle(layout.scheme, layout.out_features, layout.in_features, codes=data,
                            bias=load_bias(prefix, layout.out_features, dtype))  # fmt: skip

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        return with_bias({bundle.scheme.name.lower(): bundle.stored}, bundle)

    def dequant(self, bundle: LinearBundle) -> Tensor:
        """``[out, in] float32``, or in the type of the bias if there is one."""
        dtype = torch.float32 if bundle.bias is None else bundle.bias.dtype
        return dequantize(bundle.stored, bundle.scheme.name, dtype)

    def _tensor(self, prefix: Prefix) -> str:
        return next((name for name in prefix.tensors() if name.upper() in BLOCK_TYPES), 'weight')
