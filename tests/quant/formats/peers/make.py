#!/usr/bin/env python3
"""Write awq.safetensors and gptq.safetensors: layers as AutoAWQ and AutoGPTQ themselves unpack and pack them.

    pip download --no-deps autoawq==0.2.9 auto-gptq==0.7.1    # then unpack both
    python tests/quant/formats/peers/make.py FOLDER_OF_AUTOAWQ FOLDER_OF_AUTOGPTQ

Both packages are unmaintained and need an old torch as a whole; the modules that pack and unpack need nothing but
torch and transformers, and are loaded as files. ``weight`` is what their layer multiplies with, ``[in, out]``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
INPUTS, OUTPUTS, GROUP = 64, 32, 32


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def awq(folder: Path) -> dict[str, Tensor]:
    """Random words, as AutoAWQ dequantises them."""
    peer = module(folder / 'awq' / 'utils' / 'packing_utils.py')
    words = torch.randint(-(1 << 31), 1 << 31, (INPUTS + INPUTS // GROUP, OUTPUTS // 8)).to(torch.int32)
    qweight, qzeros = words[:INPUTS].clone(), words[INPUTS:].clone()
    scales = torch.rand(INPUTS // GROUP, OUTPUTS).half().float()
    weight = peer.dequantize_gemm(qweight, qzeros, scales, 4, GROUP)
    return {'qweight': qweight, 'qzeros': qzeros, 'scales': scales, 'weight': weight}


def gptq(folder: Path, bits: int, shuffled: bool, symmetric: bool) -> dict[str, Tensor]:
    """Random codes, as AutoGPTQ packs them and multiplies with them."""
    peer = module(folder / 'auto_gptq' / 'nn_modules' / 'qlinear' / 'qlinear_cuda.py')
    groups = torch.arange(INPUTS, dtype=torch.int32) // GROUP
    groups = groups[torch.randperm(INPUTS)] if shuffled else groups
    scales = (torch.rand(OUTPUTS, INPUTS // GROUP) + 0.5).half().float()
    zeros = torch.randint(1, 1 << bits, (OUTPUTS, INPUTS // GROUP)).float()
    if symmetric:
        zeros.fill_(1 << bits - 1)
    codes = torch.randint(0, 1 << bits, (OUTPUTS, INPUTS)).float()
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = (codes - zeros[:, groups.long()]) * scales[:, groups.long()]
    layer = peer.QuantLinear(bits, GROUP, INPUTS, OUTPUTS, False, weight_dtype=torch.float32)
    layer.pack(linear, scales, zeros, groups)
    return {'qweight': layer.qweight, 'qzeros': layer.qzeros, 'scales': layer.scales, 'g_idx': layer.g_idx,
            'weight': layer(torch.eye(INPUTS))}


def main() -> None:
    torch.manual_seed(0)
    save_file(awq(Path(sys.argv[1])), HERE / 'awq.safetensors')
    layers = {f'{bits}{"act" * shuffled}{"sym" * symmetric}': gptq(Path(sys.argv[2]), bits, shuffled, symmetric)
              for bits in (2, 3, 4, 8) for shuffled in (False, True) for symmetric in (False, True)}
    save_file({f'{name}.{part}': tensor.contiguous() for name, layer in layers.items()
               for part, tensor in layer.items()}, HERE / 'gptq.safetensors')


if __name__ == '__main__':
    main()
