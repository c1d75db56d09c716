"""Layers with transformed inputs: the same products as those of the plain weight, in every kind of layer and format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config

from lmdeploy.config.quantization import Storage, read_quantization
from lmdeploy.errors import LoadError
from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.nn.mlp import GatedMLP
from lmdeploy.ops.hadamard import hadamard
from lmdeploy.quant.formats.base import WeightFormat
from lmdeploy.quant.formats.dense import DenseFormat
from lmdeploy.quant.policy import FORMATS, QuantPolicy
from lmdeploy.quant.rounding import round_weight
from lmdeploy.quant.transform import plain_weight, transformed
from lmdeploy.weights.checkpoint import Prefix
from tests.quant.formats.folders import compressed_config
from tests.quant.formats.test_dense_gguf import saved

BLOCK, WIDTH, OUT = 32, 96, 48
NAME = f'hadamard:{BLOCK}'
WEIGHTS = {'num_bits': 4, 'type': 'int', 'symmetric': True, 'strategy': 'group', 'group_size': 32}
APPLY = {'targets': ['Linear'], 'ignore': ['lm_head']}
TRANSFORM = {'config_groups': {'spread': {
    'type': 'hadamard', 'head_dim': BLOCK, 'randomize': False, 'precision': 'torch.float32',
    'apply': [APPLY | {'location': 'weight_input', 'inverse': True}, APPLY | {'location': 'input'}]}}}
STORAGES = [
    Storage('pack-quantized', bits=4, group=32, symmetric=False, transform=NAME),
    Storage('pack-quantized', bits=2, group=32, transform=NAME),
    Storage('pack-quantized', bits=4, group=32, activation='int8', transform=NAME),
    Storage('int-quantized', activation='int8', transform=NAME),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(folder: Path, storage: Storage, weight: torch.Tensor) -> tuple[WeightFormat, Prefix]:
    """``weight`` as a file whose codes are of the transformed one."""
    form = FORMATS[storage.format](storage)
    return form, saved(folder, form.save(round_weight(hadamard(weight, BLOCK), storage)))


@pytest.mark.parametrize('storage', STORAGES, ids=str)
def test_a_layer_multiplies_as_the_plain_weight_does(tmp_path, storage):
    form, prefix = stored(tmp_path, storage, random(OUT, WIDTH))
    bundle = form.load(prefix, torch.float32)
    assert bundle.input_transform == NAME and form.describe(prefix, torch.float32).transform == NAME
    x, layer = random(5, WIDTH, seed=1), Linear(Build(), WIDTH, (OUT,))
    layer.set(bundle)
    found, wanted = layer(x), x @ plain_weight(bundle).t()
    error = (found - wanted).norm() / wanted.norm()
    assert error < (1e-5 if not storage.activation else 0.02)
    torch.testing.assert_close(layer.apply_float(x), found)
    assert (wanted - x @ random(OUT, WIDTH).t()).norm() / wanted.norm() < (0.6 if storage.bits == 2 else 0.15)


def test_gated_layers_too(tmp_path):
    bundles = []
    for seed in range(2):
        form, prefix = stored(tmp_path / str(seed), STORAGES[0], random(OUT, WIDTH, seed=seed))
        bundles.append(form.load(prefix, torch.float32))
    x, mlp = random(5, WIDTH, seed=3), GatedMLP(Build(), WIDTH, OUT, 'silu', False)
    mlp.gate_up.set(*bundles)
    gate, up = (x @ plain_weight(bundle).t() for bundle in bundles)
    torch.testing.assert_close(mlp.gate_up(x), torch.nn.functional.silu(gate) * up, atol=1e-4, rtol=1e-4)


def test_a_layer_that_stayed_dense_is_transformed_as_well(tmp_path):
    config = compressed_config('pack-quantized', WEIGHTS) | {'transform_config': TRANSFORM}
    policy = QuantPolicy(read_quantization({'quantization_config': config}))
    prefix = saved(tmp_path, {'weight': hadamard(random(OUT, WIDTH), BLOCK)})
    form = policy.format(prefix)
    assert isinstance(form, DenseFormat)
    layer = Linear(Build(policy=policy), WIDTH, (OUT,))
    layer.check(prefix)
    layer.load(prefix)
    x = random(5, WIDTH, seed=1)
    torch.testing.assert_close(layer(x), x @ random(OUT, WIDTH).t(), atol=1e-4, rtol=1e-4)


def test_parts_of_one_layer_have_one_transform(tmp_path):
    parts = []
    for i, storage in enumerate((STORAGES[0], replace(STORAGES[0], transform=''))):
        parts.append(stored(tmp_path / str(i), storage, random(OUT, WIDTH)))

    class Each:
        """A policy that reads each file as it was written."""

        def format(self, prefix: Prefix) -> WeightFormat:
            return next(form for form, held in parts if held is prefix)

        def describe(self, prefix: Prefix, dtype: torch.dtype):
            return self.format(prefix).describe(prefix, dtype)

    layer = Linear(replace(Build(), policy=Each()), WIDTH, (OUT, OUT))
    for act in (layer.check, layer.load):
        with pytest.raises(LoadError) as caught:
            act(*(prefix for _, prefix in parts))
        assert caught.value.code == 'LMD-141'


def test_blocks_that_do_not_divide_the_inputs_are_refused(tmp_path):
    storage = replace(STORAGES[0], transform='hadamard:64')
    form = FORMATS[storage.format](storage)
    prefix = saved(tmp_path, form.save(round_weight(random(OUT, WIDTH), storage)))
    with pytest.raises(LoadError, match='blocks of 64') as caught:
        form.describe(prefix, torch.float32)
    assert caught.value.code == 'LMD-142'


def test_unknown_transforms_are_refused():
    with pytest.raises(ValueError, match='no transform'):
        transformed(torch.add, 'fourier:64')


def test_compressed_tensors_reads_the_config_as_we_do():
    """Their transform of the same config, on a dense model: weights change as ours, and the outputs stay."""
    config = TransformConfig(**TRANSFORM)
    assert TransformConfig(**config.model_dump(mode='json')) == config
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, OUT, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(random(OUT, WIDTH))
    x = random(5, WIDTH, seed=1)
    wanted = model(x)
    apply_transform_config(model, config)
    torch.testing.assert_close(model[0].weight.detach(), hadamard(random(OUT, WIDTH), BLOCK), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    ours = read_quantization({'quantization_config': compressed_config('pack-quantized', WEIGHTS)
                              | {'transform_config': config.model_dump(mode='json')}})  # fmt: skip
    assert ours is not None and ours.transform('0') == NAME
