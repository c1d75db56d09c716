"""Rotations that are folded in, and the order that accuracy is measured in: the model computes the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lmdeploy.config.quantization import Storage
from lmdeploy.errors import ConfigError
from lmdeploy.lite.evaluate import Head
from lmdeploy.lite.layer import Layers
from lmdeploy.lite.recipe import LayerWeights, Recipe, TopWeights
from lmdeploy.lite.rotate import orthogonal
from lmdeploy.lite.rotated import GPTQ, block_name, both_sides, corrected
from lmdeploy.lite.source import open_source
from lmdeploy.ops.hadamard import hadamard
from tests.models.conftest import tiny  # noqa: F401
from tests.models.tiny import ARCHITECTURES, VOCAB

CPU = torch.device('cpu')
AWQ4, PACKED = Storage('awq', bits=4, group=16, symmetric=False), Storage('pack-quantized', bits=2, group=16)
PERMUTE = Path(__file__).parents[2] / 'benchmark' / 'accuracy' / 'permute.py'


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(folder: Path, recipe: Recipe) -> torch.Tensor:
    """Of a few tokens, with the recipe's transforms."""
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    source = open_source(folder, torch.float32)
    recipe.prepare(source.spec)
    top = source.top(CPU)
    recipe.transform_top(top)
    layers, x = Layers.of(source, CPU), (top.embedding[ids] * source.spec.embedding_scale)[None]
    for i in range(source.num_layers):
        layer = source.layer(i, CPU)
        for norm in layer.norms.values():  # norms of ones would hide that they are folded
            norm.mul_(random(len(norm), seed=i).exp())
        recipe.transform(layer)
        x = layers(layer, x)
    source.checkpoint.close()
    return Head(top.norm, top.head, source.config.rms_norm_eps).logits(x[0])


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('rotation', ['portable', 'native'])
def test_logits_stay(tiny, arch, rotation):  # noqa: F811
    wanted = logits(tiny(arch), GPTQ(AWQ4))
    form = AWQ4 if rotation == 'portable' else PACKED
    if rotation == 'portable' and arch.startswith('Gemma3'):
        with pytest.raises(ConfigError, match=arch) as caught:
            logits(tiny(arch), GPTQ(form, rotation))
        assert caught.value.code == 'LMD-631' and caught.value.text('zh')
        return
    found = logits(tiny(arch), GPTQ(form, rotation))
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_files_that_cannot_say_it_are_refused(tiny):  # noqa: F811
    with pytest.raises(ConfigError, match='awq') as caught:
        logits(tiny('Qwen2ForCausalLM'), GPTQ(AWQ4, 'native'))
    assert caught.value.code == 'LMD-632' and caught.value.text('zh')


@pytest.mark.parametrize('size', [1, 8, 64, 96, 80, 112])
def test_rotations_are_orthogonal_flat_and_always_the_same(size):
    made = orthogonal(size, 7).double()
    torch.testing.assert_close(made @ made.t(), torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(orthogonal(size, 7), orthogonal(size, 7))
    assert size == 1 or not torch.equal(orthogonal(size, 7), orthogonal(size, 8))
    runs = made.abs().unflatten(1, (-1, size & -size))
    torch.testing.assert_close(runs.amax(2), runs.amin(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(('width', 'name'), [(896, 'hadamard:128'), (576, 'hadamard:64'), (48, 'hadamard:16'),
                                             (4864, 'hadamard:128'), (20, '')])  # fmt: skip
def test_the_largest_block_that_divides(width, name):
    assert block_name(width) == name


def test_statistics_follow_their_inputs():
    x = random(50, 64)
    turned = hadamard(x, 32)
    torch.testing.assert_close(both_sides(x.t() @ x, 'hadamard:32'), turned.t() @ turned, atol=1e-3, rtol=1e-4)


def test_a_corrected_weight_undoes_what_earlier_layers_did(monkeypatch):
    """Where the inputs lost a linear part, the whole correction gives back the right outputs."""
    right, weight = random(400, 24), random(8, 24, seed=1)
    spoiled = right @ (torch.eye(24) + 0.1 * random(24, 24, seed=2))
    hessian, cross = spoiled.t() @ spoiled / 400, (right - spoiled).t() @ spoiled / 400
    monkeypatch.setattr('lmdeploy.lite.rotated.CORRECTION', 1.0)
    aim = corrected(weight, hessian, cross, 1e-6)
    error, before = ((spoiled @ w.t() - right @ weight.t()).norm() for w in (aim, weight))
    assert error < 0.01 * before
    monkeypatch.setattr('lmdeploy.lite.rotated.CORRECTION', 0.5)
    part = (spoiled @ corrected(weight, hessian, cross, 1e-6).t() - right @ weight.t()).norm()
    assert 0.4 * before < part < 0.6 * before


class Permuted(Recipe):
    """Not a way of quantising: channels and heads in another order."""

    def __init__(self, seed: int) -> None:
        spec = importlib.util.spec_from_file_location('permute', PERMUTE)
        assert spec is not None and spec.loader is not None
        self.permute, self.seed = importlib.util.module_from_spec(spec), seed
        spec.loader.exec_module(self.permute)

    def key(self):
        return {}

    def storage(self, layer, site):
        return None

    def fit(self, site, statistics):
        raise NotImplementedError

    def transform_top(self, top: TopWeights) -> None:
        self.permute.permute_top(top, self.seed)

    def transform(self, layer: LayerWeights) -> None:
        before = {role: linear.weight for role, linear in layer.linears.items()}
        self.permute.permute_layer(layer, self.seed)
        for role, linear in layer.linears.items():
            assert not torch.equal(linear.weight, before[role])
            assert torch.equal(linear.weight.flatten().sort().values, before[role].flatten().sort().values)


@pytest.mark.parametrize('arch', ['Qwen2ForCausalLM', 'LlamaForCausalLM', 'Qwen3ForCausalLM', 'Gemma3ForCausalLM'])
@pytest.mark.parametrize('seed', [1, 2])
def test_another_order_of_channels_and_heads_is_the_same_function(tiny, arch, seed):  # noqa: F811
    wanted = logits(tiny(arch), GPTQ(AWQ4))
    found = logits(tiny(arch), Permuted(seed))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
