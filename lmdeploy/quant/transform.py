"""What is done to a layer's inputs before the product: the block Hadamard transform, by name.

A bundle's ``input_transform`` is ``'hadamard:128'``: its codes stand for a weight whose input channels were transformed
in the same way, which undoes it. Kernels know nothing of it: the layer transforms x and gives them the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lmdeploy.config.quantization import hadamard_block
from lmdeploy.ops.hadamard import hadamard
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle


def transform(x: Tensor, name: str) -> Tensor:
    """``x [..., in]`` transformed as ``name`` says; ``''``: x itself."""
    return hadamard(x, hadamard_block(name)) if name else x


def transformed(apply: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """``apply(x, ...)`` of a kernel, on x transformed as ``name`` says."""
    if not name:
        return apply
    block = hadamard_block(name)

    def run(x: Tensor, *args: object) -> Tensor:
        return apply(hadamard(x, block), *args)

    return run


def without_transform(bundle: LinearBundle) -> LinearBundle:
    """What a kernel multiplies transformed inputs by."""
    return replace(bundle, input_transform='') if bundle.input_transform else bundle


def plain_weight(bundle: LinearBundle) -> Tensor:
    """``[out, in] float32``: what multiplies plain inputs to the same effect as ``bundle`` does transformed ones."""
    return transform(dequantize_bundle(bundle, torch.float32), bundle.input_transform)
