"""Rounding, searches and folding: what they promise, on small random layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.config.quantization import AWQ as FORMAT
from lmdeploy.config.quantization import GPTQ, PACK, SMOOTH, Storage
from lmdeploy.errors import ConfigError
from lmdeploy.lite import hidden
from lmdeploy.lite.awq import AWQ
from lmdeploy.lite.driver import Driver, Streams, sites_of
from lmdeploy.lite.hidden import Hidden, pieces_of
from lmdeploy.lite.job import check_groups
from lmdeploy.lite.layer import Layers
from lmdeploy.lite.recipe import Need, Site, SiteStatistics, relative_loss
from lmdeploy.lite.rounding import bundle_of, codes_of, make_grid, output_loss, rounded, sketch
from lmdeploy.lite.smooth import SmoothQuant
from lmdeploy.lite.source import open_source
from lmdeploy.lite.statistics import Gatherer
from lmdeploy.lite.workdir import WorkDir
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.rounding import round_weight

CPU = torch.device('cpu')
NONE: frozenset[Need] = frozenset()
STORAGES = [
    Storage(FORMAT, bits=4, group=32, symmetric=False),
    Storage(FORMAT, bits=4, group=32),
    Storage(GPTQ, bits=3, group=16, symmetric=False, zero_shift=1),
    Storage(PACK, bits=8),
    Storage(SMOOTH, 'float8_e4m3fn'),
    Storage(SMOOTH, 'float8_e5m2'),
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(x: torch.Tensor, *needs: Need) -> SiteStatistics:
    gatherer = Gatherer('x', x.shape[1], len(x), frozenset(needs), CPU)
    for part in x.split(7):
        gatherer.add(part)
    return gatherer.finish()


def with_outliers(tokens: int, width: int) -> torch.Tensor:
    """Inputs a few of whose channels are thirty times as large as the others."""
    x = noise(tokens, width, seed=1)
    x[:, ::17] *= 30
    return x


@pytest.mark.parametrize('storage', STORAGES, ids=str)
def test_grids_are_those_of_rounding(storage):
    weight = noise(24, 96)
    wanted = round_weight(weight, storage, torch.float16 if storage.group else torch.float32)
    grid = make_grid(weight, storage)
    found = bundle_of(codes_of(weight, grid), grid)
    assert torch.equal(dequantize_bundle(found, torch.float32), dequantize_bundle(wanted, torch.float32))
    assert torch.equal(rounded(weight, storage), dequantize_bundle(wanted, torch.float32))


def test_statistics_are_those_of_all_tokens():
    x = with_outliers(50, 20)
    found = statistics_of(x, 'hessian', 'sample')
    torch.testing.assert_close(found.hessian, x.t() @ x / 50)
    torch.testing.assert_close(found.absmean, x.abs().mean(0))
    assert torch.equal(found.absmax, x.abs().amax(0)) and torch.equal(found.sample, x)
    scale = torch.rand(20) + 0.5
    scaled = statistics_of(x / scale, 'hessian', 'sample')
    found.scaled(scale)
    torch.testing.assert_close(found.hessian, scaled.hessian)
    torch.testing.assert_close(found.absmax, scaled.absmax)


def test_losses_of_hessian_and_tokens_agree():
    x, weight = with_outliers(60, 32), noise(12, 32)
    delta = 0.1 * noise(12, 32, seed=2)
    wanted = float((x @ delta.t()).square().sum() / (x @ weight.t()).square().sum())
    assert output_loss(delta, weight, statistics_of(x, 'sample')) == pytest.approx(wanted, rel=1e-4)
    assert output_loss(delta, weight, statistics_of(x, 'hessian')) == pytest.approx(wanted, rel=1e-4)
    assert relative_loss(delta, weight, x.t() @ x) == pytest.approx(wanted, rel=1e-4)


def test_a_sketch_estimates_the_error():
    x, delta = with_outliers(2000, 64), noise(40, 64)
    exact = float((x @ delta.t()).square().sum() / 2000)
    assert float((delta @ sketch(x, 256, 0)).square().sum()) == pytest.approx(exact, rel=0.15)
    torch.testing.assert_close(sketch(x[:100], 256, 0) @ sketch(x[:100], 256, 0).t(), x[:100].t() @ x[:100] / 100)


def site_of(toy) -> dict[str, Site]:
    source = open_source(toy)
    layer = source.layer(0, CPU)
    source.checkpoint.close()
    return sites_of(layer)


@pytest.mark.parametrize('name', ['qkv', 'o', 'gate_up', 'down'])
@pytest.mark.parametrize('effort', ['fast', 'normal', 'high'])
def test_awq_is_never_worse_than_rounding_and_better_with_outliers(toy, name, effort):
    site = site_of(toy)[name]
    x = with_outliers(300, site.in_features)
    recipe = AWQ(STORAGES[0], effort)
    statistics = statistics_of(x, *recipe.needs)
    weight = site.weight.clone()
    plain = output_loss(rounded(weight, recipe.form) - weight, weight, statistics_of(x, 'sample'))
    scale = recipe.scale(site, statistics)
    if scale is not None:
        spread = scale[site.tie]
        for linear in site.linears:
            linear.weight = linear.weight * spread
        statistics.scaled(spread)
    fitted = recipe.fit(site, statistics)
    assert fitted.report.loss < 0.8 * plain
    assert fitted.report.baseline == pytest.approx(plain, rel=0.05)
    assert set(fitted.bundles) == {linear.role for linear in site.linears}


def test_smooth_quant_moves_outliers_into_weights(toy):
    site = site_of(toy)['gate_up']
    x = with_outliers(300, site.in_features)
    recipe = SmoothQuant(Storage(SMOOTH, activation='int8'))
    statistics = statistics_of(x, 'sample')
    scale = recipe.scale(site, statistics)
    assert scale is not None and float(scale[::17].min()) > float(scale[1:17].max())
    flat = statistics_of(noise(300, site.in_features), 'sample')
    assert site.notes['alpha'] > 0 and flat.outlier < statistics.outlier


@pytest.mark.parametrize('name', ['qkv', 'o', 'gate_up', 'down'])
def test_folded_scales_change_nothing(toy, tmp_path, name):
    """Norms are rounded to the type in which they are written, and the weights make up for that exactly."""
    source = open_source(toy, torch.float32)
    layer, layers = source.layer(0, CPU), Layers.of(source, CPU)
    x = noise(2, 9, source.config.hidden_size)
    before = layers(layer, x)
    source.dtype = torch.bfloat16
    driver = Driver(source, AWQ(STORAGES[0]), WorkDir(tmp_path, ''), Streams(empty(source, tmp_path)), CPU)
    site = sites_of(layer)[name]
    scale = torch.rand(site.channels, generator=torch.Generator().manual_seed(3)) * 3 + 0.2
    driver._fold(layer, site, scale, statistics_of(noise(5, site.in_features)))
    torch.testing.assert_close(layers(layer, x), before, atol=2e-4, rtol=2e-4)
    source.checkpoint.close()


def empty(source, folder) -> Hidden:
    return Hidden([torch.arange(4)], source.config.hidden_size, 1, CPU, folder / 'x')


def test_hidden_states_in_a_file_and_in_memory(tmp_path, monkeypatch):
    sequences = [torch.arange(6), torch.arange(6), torch.arange(6), torch.arange(4)]
    assert [(p.start, p.sequences, p.length) for p in pieces_of([6, 6, 6, 4], 2)] == [(0, 2, 6), (12, 1, 6), (18, 1, 4)]
    embedding = noise(10, 3)
    memory = Hidden(sequences, 3, 2, CPU, tmp_path / 'a')
    monkeypatch.setattr(hidden, 'IN_MEMORY', 0)
    file = Hidden(sequences, 3, 2, CPU, tmp_path / 'b')
    for stream in (memory, file):
        stream.fill(embedding, 2.0)
        for piece, x in stream:
            stream.write(piece, x + 1)
    for (_, a), (_, b) in zip(memory, file, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(file.read(file.pieces[1])[0], embedding[:6] * 2 + 1)
    assert list(tmp_path.iterdir()) == []  # the file's name is gone at once


def test_groups_that_do_not_divide(toy):
    source = open_source(toy)
    with pytest.raises(ConfigError, match=r'LMD-606.*--w-group-size 32'):
        check_groups(source, AWQ(Storage(FORMAT, bits=4, group=48, symmetric=False)))
    check_groups(source, AWQ(Storage(FORMAT, bits=4, group=0, symmetric=False)))
    source.checkpoint.close()


def test_a_cpu_takes_fewer_tokens_and_says_so(toy, monkeypatch):
    from lmdeploy.lite import job

    source = open_source(toy)
    given = job.Options(calib_samples=64, calib_seqlen=512)
    assert job.amount(source, given, CPU, NONE) == (512, 64, 0)  # the toy is small enough for all of them
    monkeypatch.setattr(job, 'CPU_WORK', 1e6)
    assert job.amount(source, given, CPU, NONE) == (512, 4, 64 * 512)
    monkeypatch.setattr(job, 'LEAST_TOKENS', 0)
    assert job.amount(source, given, CPU, frozenset({'hessian'})) == (192, 1, 64 * 512)  # twice the widest input
    assert job.amount(source, given, torch.device('meta'), NONE) == (512, 64, 0)
    for limit, wanted in ((100, (100, 1)), (1 << 40, (512, 64))):
        assert job.amount(source, replace(given, calib_tokens=limit), CPU, NONE)[:2] == wanted
    source.checkpoint.close()


def test_modules_that_nobody_knows_are_refused(toy, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / 'model'
    shutil.copytree(toy, folder)
    tensors = load_file(folder / 'model.safetensors')
    save_file(tensors | {'model.layers.1.mlp.experts.0.weight': torch.zeros(2, 2)}, folder / 'model.safetensors')
    with pytest.raises(ConfigError, match=r'LMD-601.*experts'):
        open_source(folder)
    tensors.pop('model.layers.1.mlp.up_proj.weight')
    save_file(tensors, folder / 'model.safetensors')
    from lmdeploy.errors import LoadError

    with pytest.raises(LoadError, match='LMD-132'):
        open_source(folder)
