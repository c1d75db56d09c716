"""Every way of running a request gives the same greedy tokens: transformers', 32 steps long.

One parametrised test over architecture x depth x chunk size x prefix cache x cache size (small: requests are preempted
and recomputed), with prompts of unequal lengths in one batch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.runner.graphs import rerun
from tests.models.tiny import ARCHITECTURES, VOCAB, load_reference, make_tiny

NEW = 32
LENGTHS = (60, 1, 64, 63, 130, 31, 90, 62)  # around the block size; one longer than a chunk and a sliding window

# name -> (engine options, depth, prefix cache, prompts are sent twice)
WAYS = {
    'plain': ({}, 1, False, False),
    'overlapped': ({}, 2, False, False),
    'chunked': ({'max_step_tokens': 24}, 1, False, False),
    'chunked, overlapped': ({'max_step_tokens': 17}, 2, False, False),
    'one by one': ({'max_batch_size': 1}, 2, False, False),
    'prefix-cached': ({}, 1, True, True),
    'prefix-cached, chunked, overlapped': ({'max_step_tokens': 40}, 2, True, True),
    'preempted': ({'num_blocks': 6}, 1, False, False),
    'preempted, prefix-cached, chunked, overlapped': ({'num_blocks': 5, 'max_step_tokens': 128}, 2, True, True),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('equivalence')
    return lambda arch: make_tiny(arch, root / arch)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(3, VOCAB, (70,), generator=generator).tolist()  # some begin alike
    return [(shared if n > 80 else [])[:n] + torch.randint(3, VOCAB, (max(n - 70, 0) if n > 80 else n,),
                                                           generator=generator).tolist() for n in LENGTHS]


@cache
def reference(folder: Path) -> list[list[int]]:
    model = load_reference(folder)
    answers = []
    with torch.inference_mode():
        for ids in prompts():
            out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                 max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None,
                                 pad_token_id=0)
            answers.append(out[0, len(ids):].tolist())
    return answers


def run(core: EngineCore, requests: list[EngineInput]) -> dict[str, list[int]]:
    """Step the engine until it is idle; every invariant is checked after every step."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        core.submit(request)
    while not core.idle:
        for delta in core.step():
            tokens[delta.id] += delta.tokens
            assert delta.finish is None or delta.finish.error is None, delta.finish
        core.check()
    return tokens


# device, runner, and what records graphs (on a CPU nothing does unless told to: static buffers, buckets and tables)
DEVICES = {
    'cpu': ('cpu', 'eager', None),
    'static buffers': ('cpu', 'graph', rerun),
    'gpu': ('cuda', 'eager', None),
    'graph': ('cuda', 'graph', None),
}


# what static buffers do does not depend on the architecture; two of them use every part of the decoder
CASES = [
    pytest.param(arch, way, device, marks=[pytest.mark.gpu] if device in ('gpu', 'graph') else [])
    for device in DEVICES for way in WAYS for arch in ARCHITECTURES
    if device != 'static buffers' or arch in ('Qwen2ForCausalLM', 'Gemma3ForCausalLM')
]


@pytest.mark.parametrize(('arch', 'way', 'device'), CASES)
def test_the_same_tokens_whatever_the_way(arch, way, device, folders):
    options, depth, prefix_caching, twice = WAYS[way]
    folder = folders(arch)
    device, runner, record = DEVICES[device]
    config = EngineConfig(**({'dtype': 'float32', 'device': device, 'runner': runner, 'session_len': 256,
                              'max_batch_size': 8, 'num_blocks': 40} | options))
    executor = LocalExecutor(config, folder, record=record)
    core = EngineCore(executor, executor.start(), depth=depth, prefix_caching=prefix_caching)
    params = SamplingParams(max_new_tokens=NEW)
    for turn in range(2 if twice else 1):
        requests = [EngineInput(f'{turn}.{i}', ids, params) for i, ids in enumerate(prompts())]
        tokens = run(core, requests)
        assert [tokens[request.id] for request in requests] == reference(folder), f'turn {turn}'
    stats = core.stats()
    assert stats.used_blocks == 0
    assert ('preempted' in way) == (stats.preemptions > 0)
    assert twice == (stats.prefix_hit_tokens > 0)
    executor.stop()
