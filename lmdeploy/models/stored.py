"""What the weights of a decoder's layers take, as they are stored and as they are kept."""

from __future__ import annotations

from math import prod

import torch

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.registry import decoder_spec
from lmdeploy.models.shapes import tensor_shapes
from lmdeploy.quant.formats.base import scheme_of
from lmdeploy.quant.kernels import Dequantised, KernelCase, QuantisedInput, choose_kernel
from lmdeploy.weights.checkpoint import Checkpoint
from lmdeploy.weights.dequant import BLOCK_TYPES, FOUR_BITS


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


def bytes_of_blocks(checkpoint: Checkpoint) -> float | None:
    """As :func:`bytes_per_weight`, of a file whose blocks stay quantised; None: it has none.

    Blocks of 4 bits keep a scale and an offset of 16 bits for every 32 weights, others become codes of 8 bits.
    """
    sizes, total = 0, 0.0
    for name in checkpoint.names():
        stored = checkpoint.stored(name)
        if '.layers.' in name and stored.dtype_name in BLOCK_TYPES:
            sizes += prod(stored.shape)
            total += prod(stored.shape) * (5 / 8 if stored.dtype_name in FOUR_BITS else 1)
    return total / sizes if sizes else None


DENSE = (Dequantised.name, QuantisedInput.name)
