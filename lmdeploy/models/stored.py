"""What the weights of a decoder's layers take, as they are stored and as they are kept."""

from __future__ import annotations

import torch

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.registry import decoder_spec
from lmdeploy.models.shapes import tensor_shapes
from lmdeploy.quant.formats.base import scheme_of
from lmdeploy.quant.kernels import Dequantised, KernelCase, QuantisedInput, choose_kernel


def bytes_per_weight(config: ModelConfig, dtype: torch.dtype, device: torch.device | None = None) -> float:
    """Bytes of one weight of the layers' matrices, on average, as they are stored; dense ones are of ``dtype``.

    Args:
        device: where it runs: what no kernel multiplies as codes there is kept dense, and counted so.
    """
    if config.quantization is None:
        return dtype.itemsize
    spec = decoder_spec(config)
    sizes, total = 0, 0.0
    for name, shape in tensor_shapes(spec).items():
        if len(shape) != 2 or f'.{spec.names.layers}.' not in f'.{name}':
            continue
        storage, width = config.quantization.storage(name.removesuffix('.weight')), float(dtype.itemsize)
        if storage is not None:
            scheme = scheme_of(storage)
            dense = device is not None and choose_kernel(KernelCase(scheme, dtype, device, *shape)).name in DENSE
            width = width if dense else scheme.weight_bits / 8
        sizes += shape[0] * shape[1]
        total += width * shape[0] * shape[1]
    return total / sizes


DENSE = (Dequantised.name, QuantisedInput.name)
