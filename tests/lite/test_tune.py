"""Tuning: the layer's error falls, codes stay on their grid, and what does not help is not taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.config.quantization import PACK, Storage
from lmdeploy.lite.driver import sites_of
from lmdeploy.lite.layer import Layers
from lmdeploy.lite.recipe import SITES, Block
from lmdeploy.lite.rotated import GPTQ
from lmdeploy.lite.source import open_source
from lmdeploy.lite.statistics import Gatherer
from lmdeploy.lite.tune import error, tune
from lmdeploy.quant.transform import plain_weight
from tests.lite.runs import W4, options, run

CPU = torch.device('cpu')
FORMS = {
    'w2 native': (Storage(PACK, bits=2, group=32, symmetric=False), 'native'),
    'w3': (Storage(PACK, bits=3, group=32), 'none'),
    'w4 portable': (W4, 'portable'),
}


def fitted(folder, form, rotation) -> Block:
    """The first layer, rounded by GPTQ."""
    source = open_source(folder, torch.float32)
    recipe = GPTQ(form, rotation, 'fast')
    recipe.prepare(source.spec)
    layer, layers = source.layer(0, CPU), Layers.of(source, CPU)
    recipe.transform(layer)
    x = torch.randn(3, 2, 24, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    sites = sites_of(layer)
    gatherers = {name: Gatherer(name, sites[name].in_features, 144, recipe.needs, CPU) for name in SITES}
    for piece in x:
        layers(layer, piece, lambda site, values: (gatherers[site].add(values), values)[1])
    block = Block(layer, {name: recipe.fit(sites[name], gatherers[name].finish()) for name in SITES},
                  lambda: ((piece, layers(layer, piece)) for piece in x),
                  lambda piece, weights: layers(layer, piece, weights=weights))  # fmt: skip
    source.checkpoint.close()
    return block


def dense(block: Block) -> dict[str, torch.Tensor]:
    return {role: plain_weight(b) for one in block.fitted.values() for role, b in one.bundles.items()}


@pytest.mark.parametrize('name', FORMS)
def test_the_layers_error_falls(toy, name):
    form, rotation = FORMS[name]
    block = fitted(toy, form, rotation)
    old = {role: b for one in block.fitted.values() for role, b in one.bundles.items()}
    before = error(block, dense(block))
    rest = tune(block)
    after = error(block, dense(block))
    assert rest == pytest.approx(after / before, rel=1e-3) and rest < 0.97
    for role, bundle in ((r, b) for one in block.fitted.values() for r, b in one.bundles.items()):
        was = old[role]
        assert replace(bundle, codes=was.codes, scales=was.scales) == was  # nothing else changed
        assert bundle.codes.dtype is was.codes.dtype and bundle.scales.dtype is was.scales.dtype
        low = -(1 << form.bits - 1) if form.symmetric else 0
        assert bundle.codes.min() >= low and bundle.codes.max() < low + (1 << form.bits)
        assert (bundle.codes.float() - was.codes.float()).abs().max() <= 1
        assert ((bundle.scales.float() / was.scales.float() - 1).abs() < 0.05).all()


def test_what_does_not_help_is_not_taken(toy):
    block = fitted(toy, *FORMS['w4 portable'])
    old = dense(block)
    assert tune(block, 0) == 1.0 or error(block, dense(block)) <= error(block, old)
    exact = replace(block, pieces=lambda: ((x, block.forward(x, old)) for x, _ in block.pieces()))
    kept = dense(exact)
    assert tune(exact, 3) == 1.0  # there is nothing to gain
    assert all(torch.equal(new, kept[role]) for role, new in dense(exact).items())


def test_high_effort_from_end_to_end(toy, text, tmp_path):
    reports = {}
    for effort in ('fast', 'high'):
        recipe = GPTQ(FORMS['w2 native'][0], 'native', effort)
        reports[effort] = run(toy, recipe, options(tmp_path / effort, text, eval_tokens=40))
    assert all('tuned' in site.choices for layer in reports['high'].layers for site in layer.sites.values())
    kl = {effort: sum(quality.kl for quality in report.quality) for effort, report in reports.items()}
    assert kl['high'] < kl['fast']
