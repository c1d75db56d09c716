"""Tiny models in every format, each beside the dense model that it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quant.formats import packers
from tests.quant.formats.packers import random_codes

Write = Callable[[Tensor, int], tuple[dict[str, Tensor], Tensor]]
"""From a weight ``[out, in]`` and a seed to its tensors and to the dense weight that they stand for."""


@dataclass
class Model:
    """How one tiny model is stored: the writer of a layer, and config.json's part; ``inputs``: see Storage."""

    write: Write
    config: dict[str, Any]
    activation: str = ''
    activation_group: int = 0
    input_scale: float = 0.0
    also: tuple[str, ...] = field(default=())  # linears outside of the layers that are quantised too


def write_pair(source: Path, folder: Path, model: Model) -> tuple[Path, Path]:
    """Two folders of the tiny model ``source``: quantised, and dense with the values of the quantised one."""
    config = json.loads((source / 'config.json').read_text())
    packed, dense = {}, {}
    for seed, (name, tensor) in enumerate(sorted(load_file(source / 'model.safetensors').items())):
        layer = name.removesuffix('.weight')
        linear = tensor.dim() == 2 and ('.layers.' in name or layer in model.also)
        if not linear:
            packed[name] = dense[name] = tensor
            continue
        stored, dense[name] = model.write(tensor.float(), seed)
        packed |= {f'{layer}.{part}': value.contiguous().clone() for part, value in stored.items()}
    out = folder / 'packed', folder / 'dense'
    for path, tensors, more in zip(out, (packed, dense), ({'quantization_config': model.config}, {})):
        path.mkdir(parents=True)
        (path / 'config.json').write_text(json.dumps(config | more))
        save_file(tensors, path / 'model.safetensors')
    return out


def grouped(pack: Callable[[packers.Codes], dict[str, Tensor]], bits: int, group: int, symmetric: bool, *,
            shuffled: bool | str = False, scale_type: torch.dtype = torch.float16) -> Write:
    """Random codes of the weight's shape; ``shuffled='own'``: every layer in an order of its own."""
    def write(weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        codes = random_codes(weight.shape[1], weight.shape[0], bits, group, symmetric, shuffled=bool(shuffled),
                             least_zero=1, scale_type=scale_type, seed=seed if shuffled == 'own' else 0)  # fmt: skip
        codes.scales = (codes.scales.float() * 4 / (1 << bits)).to(scale_type)
        return pack(codes), codes.weight

    return write


def int8(name: str, **more: Tensor) -> Write:
    def write(weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = packers.int8_rows(weight)
        return {'weight': codes, name: scales} | more, codes.float() * scales

    return write


def fp8(name: str, **more: Tensor) -> Write:
    def write(weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = packers.fp8_rows(weight)
        return {'weight': codes, name: scales} | more, codes.float() * scales

    return write


def fp8_block(name: str, block: int) -> Write:
    def write(weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, dense = packers.fp8_blocks(weight, block)
        return {'weight': codes, name: scales}, dense

    return write


def compressed_config(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {'format': form, 'targets': ['Linear'], 'weights': weights, 'input_activations': inputs,
             'output_activations': None}
    return {'quant_method': 'compressed-tensors', 'format': form, 'quantization_status': 'compressed',
            'ignore': ['lm_head'], 'config_groups': {'group_0': group}}


def gptq_config(bits: int, group: int, sym: bool, version: int, **more: Any) -> dict[str, Any]:
    form = 'gptq' if version == 1 else 'gptq_v2'
    return {'quant_method': 'gptq', 'bits': bits, 'group_size': group, 'sym': sym, 'checkpoint_format': form} | more


TOKENS = {'num_bits': 8, 'type': 'int', 'symmetric': True, 'strategy': 'token', 'dynamic': True}
FLOATS = {'num_bits': 8, 'type': 'float', 'symmetric': True}
E4M3 = 'float8_e4m3fn'
AWQ = {'quant_method': 'awq', 'version': 'gemm', 'bits': 4, 'group_size': 16, 'zero_point': True}


def _packed(bits: int, symmetric: bool, inputs: dict[str, Any] | None = None) -> Model:
    weights = {'num_bits': bits, 'type': 'int', 'symmetric': symmetric, 'strategy': 'group', 'group_size': 16}
    write = grouped(lambda codes: packers.compressed(codes, symmetric), bits, 16, symmetric, scale_type=torch.bfloat16)
    return Model(write, compressed_config('pack-quantized', weights, inputs), 'int8' if inputs else '')


MODELS: dict[str, Model] = {
    'awq': Model(grouped(packers.awq, 4, 16, False), AWQ),
    'awq-sym-head': Model(grouped(packers.awq, 4, 16, True), AWQ | {'zero_point': False}, also=('lm_head', 'output')),
    'gptq-2': Model(grouped(lambda c: packers.gptq(c, 2), 2, 16, False), gptq_config(2, 16, False, 2)),
    'gptq-3': Model(grouped(lambda c: packers.gptq(c, 1), 3, 0, True), gptq_config(3, -1, True, 1)),
    'gptq-4': Model(grouped(lambda c: packers.gptq(c, 1), 4, 16, True), gptq_config(4, 16, True, 1)),
    'gptq-8': Model(grouped(lambda c: packers.gptq(c, 2), 8, 16, False), gptq_config(8, 16, False, 2)),
    'gptq-act': Model(grouped(lambda c: packers.gptq(c, 1), 4, 16, False, shuffled=True),
                      gptq_config(4, 16, False, 1, desc_act=True)),
    'gptq-act-own': Model(grouped(lambda c: packers.gptq(c, 1), 4, 16, True, shuffled='own'),
                          gptq_config(4, 16, True, 1, desc_act=True)),
    'packed-2': _packed(2, False),
    'packed-3': _packed(3, True),
    'packed-5': _packed(5, False),
    'w4a8': _packed(4, True, TOKENS),
    'w2a8-asym': _packed(2, False, TOKENS),
    'int8': Model(int8('weight_scale'), compressed_config('int-quantized', TOKENS | {
        'strategy': 'channel', 'dynamic': False}, TOKENS), 'int8'),
    'int8-static': Model(
        int8('weight_scale', input_scale=torch.tensor([0.05])),
        compressed_config('int-quantized', TOKENS | {'strategy': 'channel', 'dynamic': False},
                          TOKENS | {'strategy': 'tensor', 'dynamic': False}), 'int8', input_scale=0.05),
    'float8': Model(fp8('weight_scale'), compressed_config('float-quantized', FLOATS | {'strategy': 'channel'},
                    FLOATS | {'strategy': 'token', 'dynamic': True}), E4M3),
    'float8-weights': Model(fp8('weight_scale'), compressed_config('float-quantized', FLOATS | {
        'strategy': 'channel'})),
    'fp8-block': Model(fp8_block('weight_scale_inv', 16), {
        'quant_method': 'fp8', 'weight_block_size': [16, 16], 'modules_to_not_convert': ['lm_head']}, E4M3, 16),
    'fp8': Model(fp8('weight_scale'), {'quant_method': 'fp8', 'activation_scheme': 'dynamic'}, E4M3),
    'smooth-int8': Model(int8('scale'), {'quant_method': 'smooth_quant', 'quant_dtype': 'int8'}, 'int8'),
    'smooth-fp8': Model(fp8('scale'), {'quant_method': 'smooth_quant', 'quant_dtype': E4M3}, E4M3),
}  # fmt: skip
