"""Which checkpoint format each linear layer is read with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmdeploy.config.quantization import AWQ, FLOAT, FP8, GPTQ, INT, PACK, SMOOTH, Quantization, Storage
from lmdeploy.errors import LoadError
from lmdeploy.quant.formats.awq import AWQFormat
from lmdeploy.quant.formats.base import FLOATS, Layout, WeightFormat, unlike
from lmdeploy.quant.formats.compressed import PackedFormat, compressed_scaled
from lmdeploy.quant.formats.dense import DenseFormat
from lmdeploy.quant.formats.fp8 import fp8_format
from lmdeploy.quant.formats.gguf import GGUFFormat, holds_blocks
from lmdeploy.quant.formats.gptq import GPTQFormat
from lmdeploy.quant.formats.rounded import RoundedFormat
from lmdeploy.quant.formats.smooth import smooth_format
from lmdeploy.weights.checkpoint import Prefix
from lmdeploy.weights.dequant import BLOCK_TYPES

FORMATS: dict[str, Callable[[Storage], WeightFormat]] = {
    AWQ: AWQFormat,
    GPTQ: GPTQFormat,
    PACK: PackedFormat,
    INT: compressed_scaled,
    FLOAT: compressed_scaled,
    FP8: fp8_format,
    SMOOTH: smooth_format,
}


@dataclass(frozen=True, slots=True)
class QuantPolicy:
    """The formats that a checkpoint's configuration names, layer by layer.

    A layer that they do not name is dense. A layer that they name may be dense too: that shows in its tensors, and not
    every tool lists what it left alone. Made-up weights are quantised when they load.

    Attributes:
        blocks: block-quantised tensors of GGUF files stay as they are; else they are dequantised when they load.
    """

    quantization: Quantization | None = None
    blocks: bool = False

    def format(self, prefix: Prefix) -> WeightFormat:
        """The format of the layer below ``prefix``.

        Raises:
            LoadError: LMD-132: there is no such layer; LMD-142: its tensors are not what the configuration says.
        """
        tensors = prefix.tensors()
        if not tensors:
            raise LoadError('LMD-132', tensor=f'{prefix.path}.weight', file=prefix.checkpoint.path)
        storage = None if self.quantization is None else self.quantization.storage(prefix.path)
        if storage is not None and (form := FORMATS[storage.format](storage)).detect(tensors):
            return form
        if storage is not None and prefix.checkpoint.dummy:
            return RoundedFormat(storage)
        if self.blocks and holds_blocks(prefix):
            return GGUFFormat()
        dense = DenseFormat('' if self.quantization is None else self.quantization.transform(prefix.path))
        if dense.detect(tensors) and prefix.dtype_name('weight') in (*FLOATS, 'F64', *BLOCK_TYPES):
            return dense
        if storage is None and self.quantization is None and 'weight' not in tensors:
            raise LoadError('LMD-132', tensor=f'{prefix.path}.weight', file=prefix.checkpoint.path)
        held = ', '.join(f'{name} ({prefix.dtype_name(name)})' for name in tensors)
        raise unlike(prefix, dense.name if storage is None else storage.format, f'its tensors are {held}')

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        """What headers tell of the layer; raises as :meth:`format` and as the format's own ``describe``."""
        return self.format(prefix).describe(prefix, dtype)
