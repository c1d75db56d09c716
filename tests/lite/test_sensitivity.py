"""Mixed precision: the knapsack against trying everything, and a tiny model under a limit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.config.quantization import PACK, Storage
from lmdeploy.errors import ConfigError
from lmdeploy.lite.hidden import Hidden
from lmdeploy.lite.sensitivity import Mixed, Option, choose, hull, mixed, other_bytes, stored_bytes
from lmdeploy.lite.source import Source, open_source
from lmdeploy.quant.formats.compressed import PackedFormat
from lmdeploy.quant.rounding import round_weight
from tests.lite.runs import ids, options, run

CPU = torch.device('cpu')
SITE = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=4)


def made(sites: list[list[tuple[int, int]]]) -> list[list[Option]]:
    return [[Option((i, 'o'), Storage(PACK), size, 1, loss / 1000) for size, loss in site]
            for i, site in enumerate(sites)]  # fmt: skip


@given(st.lists(SITE, min_size=1, max_size=4), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_nothing_that_fits_is_better_but_for_one_step(sites, limit):
    offered = made(sites)
    fitting = [sum(o.loss for o in picked) for picked in itertools.product(*offered)
               if sum(o.bytes for o in picked) <= limit]  # fmt: skip
    if not fitting:
        with pytest.raises(ValueError, match='smallest'):
            choose(offered, limit)
        return
    chosen = choose(offered, limit)
    assert [option.place[0] for option in chosen] == list(range(len(sites)))
    assert sum(option.bytes for option in chosen) <= limit
    largest = max(first.loss - second.loss for site in offered for first in site for second in site)
    assert sum(option.loss for option in chosen) <= min(fitting) + largest + 1e-9


@given(SITE)
@settings(max_examples=100, deadline=None)
def test_the_hull_falls_ever_less_and_lies_below_all(site):
    offered = made([site])[0]
    found = hull(offered)
    slopes = [(a.loss - b.loss) / (b.bytes - a.bytes) for a, b in zip(found, found[1:])]
    assert all(slope > 0 for slope in slopes) and slopes == sorted(slopes, reverse=True)
    smallest = min(offered, key=lambda o: (o.bytes, o.loss))
    assert found[0] == smallest and found[-1].loss == min(o.loss for o in offered)


@pytest.mark.parametrize('storage', [Storage(PACK, bits=bits, group=group, symmetric=symmetric)
                                     for bits in (2, 3, 4, 8) for group in (32, 64) for symmetric in (True, False)],
                         ids=str)  # fmt: skip
def test_bytes_are_those_of_the_file(storage):
    bundle = round_weight(torch.randn(64, 128), storage, torch.float16)
    held = PackedFormat(storage).save(bundle)
    assert stored_bytes(storage, 64, 128) == sum(t.nbytes for name, t in held.items() if name != 'weight_shape')


def planned(source: Source, tmp_path, **limit) -> Mixed:
    stream = Hidden([ids(40, 1), ids(40, 2)], source.config.hidden_size, 2, CPU, tmp_path / 'hidden.bin')
    return mixed(source, stream, CPU, group=32, **limit)


def test_a_model_under_a_limit(toy, text, tmp_path):
    source = open_source(toy)
    plans = {bits: planned(source, tmp_path, bits=bits) for bits in (3.0, 4.5, 6.0)}
    sizes = {role: (out, wide) for role, out, wide in source.sizes()}
    roles = {'qkv': 'qkv', 'o': ('o',), 'gate_up': ('gate', 'up'), 'down': ('down',)}
    for bits, recipe in plans.items():
        recipe.prepare(source.spec)
        assert len(recipe.plan) == 4 * source.num_layers
        held = sum(stored_bytes(recipe.storage(*place), *sizes[role]) for place in recipe.plan
                   for role in roles[place[1]])  # fmt: skip
        weights = source.num_layers * sum(out * wide for out, wide in sizes.values())
        assert bits - 1.5 < 8 * held / weights <= bits
    used = [{storage.bits for storage in recipe.plan.values()} for recipe in plans.values()]
    assert len(used[1]) > 1 and max(used[2]) == 8
    rest = other_bytes(source, 'native')
    budget = rest + held
    assert planned(source, tmp_path, budget=budget).plan == plans[6.0].plan
    report = run(toy, plans[4.5], options(tmp_path / 'out', text, eval_tokens=40))
    shards = sum(path.stat().st_size for path in (tmp_path / 'out').glob('*.safetensors'))
    assert report.quality and shards < budget + 20_000  # headers
    with pytest.raises(ConfigError) as caught:
        planned(source, tmp_path, bits=1.0)
    assert caught.value.code == 'LMD-633' and '1 bits' in str(caught.value) and caught.value.text('zh')
    with pytest.raises(ConfigError, match='GB'):
        planned(source, tmp_path, budget=1000)
    source.checkpoint.close()
