"""A cache of codes: every way of running a request gives the same tokens, because a token is quantised for itself.

The tokens are those of the plain way, not transformers': that codes are close to numbers is stated elsewhere.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.runner.graphs import rerun
from tests.models.tiny import ARCHITECTURES, make_tiny
from tests.test_equivalence import prompts, run

NEW = 10
# name -> (engine options, depth, prefix cache, static buffers)
WAYS = {
    'one by one, overlapped': ({'max_batch_size': 1}, 2, False, False),
    'prefix-cached, chunked': ({'max_step_tokens': 40}, 1, True, False),
    'static buffers': ({'max_step_tokens': 48}, 2, False, True),
    'preempted, prefix-cached, chunked, overlapped': ({'num_blocks': 5, 'max_step_tokens': 128}, 2, True, False),
}
# what a cache of codes does differently: an offset of the keys, windows, norms
CASES = [(arch, way) for arch in ARCHITECTURES for way in WAYS
         if arch == 'Qwen2ForCausalLM' or way.startswith('preempted')]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('quantised')
    made: dict[str, Path] = {}
    return lambda arch: made.setdefault(arch, make_tiny(arch, root / arch))


def answers(folder: Path, bits: int, options: dict, depth: int = 1, prefix_caching: bool = False,
            record=None, device: str = 'cpu') -> list[list[int]]:  # fmt: skip
    """The tokens of all prompts; with a prefix cache those of the second time that they are sent."""
    config = EngineConfig(**({'dtype': 'float32', 'device': device, 'runner': 'graph' if record else 'eager',
                              'session_len': 256, 'max_batch_size': 8, 'num_blocks': 40, 'quant_policy': bits}
                             | options))  # fmt: skip
    executor = LocalExecutor(config, folder, record=record)
    core = EngineCore(executor, executor.start(), depth=depth, prefix_caching=prefix_caching)
    assert core.scheduler.capacity.choices['cache'] == f'int{bits}'
    params = SamplingParams(max_new_tokens=NEW)
    for turn in range(2 if prefix_caching else 1):
        requests = [EngineInput(f'{turn}.{i}', ids, params) for i, ids in enumerate(prompts())]
        tokens = run(core, requests)
    assert ('num_blocks' in options) == (core.stats().preemptions > 0)
    assert prefix_caching == (core.stats().prefix_hit_tokens > 0)
    executor.stop()
    return [tokens[request.id] for request in requests]


@cache
def plain(folder: Path, bits: int) -> list[list[int]]:
    return answers(folder, bits, {})


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize(('arch', 'way'), CASES)
def test_the_same_tokens_whatever_the_way(arch, bits, way, folders):
    options, depth, prefix_caching, static = WAYS[way]
    found = answers(folders(arch), bits, options, depth, prefix_caching, rerun if static else None)
    assert found == plain(folders(arch), bits)


@pytest.mark.gpu
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('arch', ['Qwen2ForCausalLM', 'Gemma3ForCausalLM'])
def test_graphs_give_the_tokens_of_the_eager_runner(arch, bits, folders):
    eager, graph = (answers(folders(arch), bits, {'runner': runner}, 2, device='cuda') for runner in ('eager', 'graph'))
    assert graph == eager
