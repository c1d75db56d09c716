"""The graph runner: buckets, static buffers and tables give what the eager runner gives, whatever requests ask for."""

from __future__ import annotations

import gc
import json
import random

import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.ops.table import Op
from lmdeploy.runner.graphs import GraphRunner, Kind, buckets, rerun
from lmdeploy.runner.mixed import Key, MixedGraphs

VOCAB = 300
CONFIG = {
    'architectures': ['Qwen3ForCausalLM'], 'vocab_size': VOCAB, 'hidden_size': 64, 'intermediate_size': 96,
    'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 16, 'eos_token_id': 1,
    'max_position_embeddings': 1024, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False,
}  # fmt: skip


def shift(token_ids, logits):
    """A logits processor."""
    return logits.roll(int(token_ids[-1]) % 7)


class Even:
    """A grammar of tokens with even ids."""

    def fill(self, mask):
        mask[:] = 0x55555555

    def accept(self, token):
        assert token % 2 == 0


SAMPLED = dict(greedy=False, temperature=5.0)  # random weights are sure of themselves
WISHES = {
    'greedy': {},
    'sampled': SAMPLED,
    'top-k': SAMPLED | {'top_k': 12},
    'top-p': SAMPLED | {'top_p': 0.75},
    'min-p': SAMPLED | {'min_p': 0.125},
    'all cuts': SAMPLED | {'top_k': 100, 'top_p': 0.875, 'min_p': 0.03125},
    'repetition': {'repetition_penalty': 1.5},
    'presence and frequency': SAMPLED | {'presence_penalty': 0.5, 'frequency_penalty': 0.25},
    'bans': {'banned_ids': (5, 6, 7), 'logit_bias': ((9, 4.0), (11, -3.0))},
    'many bans': {'banned_ids': tuple(range(100, 180))},
    'stops after some tokens': {'stop_ids': tuple(range(2, 20)), 'min_new_tokens': 5},
    'bad sequences': {'bad_sequences': tuple((a, b) for a in range(0, 300, 3) for b in (1, 2))},
    'processor': {'logits_processors': (shift,)},
    'log-probabilities': {'logprobs': 3},
    'logits': {'output_logits': 'generation'},
}


@pytest.mark.parametrize('most', [1, 2, 3, 16, 100, 256, 512])
def test_every_batch_has_a_bucket_that_is_not_much_larger(most):
    sizes = buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for rows in range(1, most + 1):
        bucket = next(size for size in sizes if size >= rows)
        assert bucket - rows < max(8, rows // 16) and bucket < 2 * rows + 1


def start(folder, *, device='cpu', runner='graph', record=None, **options):
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    config = EngineConfig(**({'dtype': 'float32', 'device': device, 'runner': runner, 'load_format': 'dummy',
                              'session_len': 256, 'max_batch_size': 12, 'num_blocks': 60} | options))
    executor = LocalExecutor(config, folder, record=record)
    return EngineCore(executor, executor.start(), depth=2)


def requests(count, seed=1, names=tuple(WISHES), grammars=True):
    generator = random.Random(seed)
    for i in range(count):
        params = SamplingParams(max_new_tokens=generator.randint(1, 60), seed=i, **WISHES[names[i % len(names)]])
        prompt = [generator.randrange(VOCAB) for _ in range(generator.choice((1, 3, 30, 60, 64, 110)))]
        strict = grammars and i % 8 == 7 and not params.logits_processors  # which come after the grammar
        yield EngineInput(f'{i}', prompt, params, grammar=Even() if strict else None)


def serve(core, given, *, aborts=0, seed=1):
    """The tokens of every request that was not aborted; aborts come at random steps."""
    generator = random.Random(seed)
    given = list(given)
    doomed = {request.id for request in generator.sample(given, aborts)}
    tokens = {request.id: [] for request in given}
    waiting = list(given)
    while waiting or not core.idle:
        for _ in range(generator.randint(0, 4)):
            if waiting:
                core.submit(waiting.pop(0))
        if doomed and generator.random() < 0.3:
            core.abort(generator.choice(sorted(doomed)))
        for delta in core.step():
            tokens[delta.id] += delta.tokens
            if delta.finish is not None:
                assert delta.finish.error is None, delta.finish
                if delta.finish.reason == 'abort':
                    del tokens[delta.id]
        core.check()
    assert core.stats().used_blocks == 0
    return tokens


@pytest.fixture
def launched(monkeypatch):
    """The keys of all graphs that are launched."""
    keys = set()
    for runner in (GraphRunner, MixedGraphs):
        for name in ('launch', 'forward'):
            if (method := getattr(runner, name, None)) is not None:
                monkeypatch.setattr(runner, name, lambda self, key, plan, method=method: (
                    keys.add(key), method(self, key, plan))[1])
    return keys


def test_static_buffers_give_what_the_eager_runner_gives(tmp_path, launched):
    wanted = serve(start(tmp_path, runner='eager'), requests(45))
    core = start(tmp_path, record=rerun)
    assert core.scheduler.capacity.choices['runner'] == 'graph'
    assert serve(core, requests(45)) == wanted
    assert {key[1] for key in launched if isinstance(key, tuple)} >= {Kind.SAMPLED, Kind.FORWARD}
    preempted = start(tmp_path, record=rerun, num_blocks=6)
    assert serve(preempted, requests(45)) == wanted
    assert preempted.stats().preemptions > 0


def test_chunks_beside_decodes_give_what_the_eager_runner_gives(tmp_path, launched):
    odd = {'processor', 'bad sequences', 'log-probabilities', 'logits', 'many bans'}
    simple = list(requests(60, seed=2, names=[name for name in WISHES if name not in odd], grammars=False))
    wanted = serve(start(tmp_path, runner='eager'), simple)
    core = start(tmp_path, record=rerun, max_step_tokens=70)
    assert serve(core, simple) == wanted
    assert len({(key.decodes, key.tokens) for key in launched if isinstance(key, Key)}) > 2


def test_every_op_that_requests_need_has_run_at_the_start(tmp_path, monkeypatch):
    """So that its kernels are compiled before requests wait, on a device that compiles."""
    called, call = set(), Op.__call__
    monkeypatch.setattr(Op, '__call__', lambda self, *args: (called.add(self.name), call(self, *args))[1])

    def run_and_record(step):
        step()
        return step

    core = start(tmp_path, record=run_and_record)
    at_start = set(called)
    serve(core, requests(45))
    without_kernels = {'contain_non_finite'}
    assert called - at_start <= without_kernels and {'ranked', 'sample_slots', 'chunk_inputs'} <= at_start


def test_a_graph_that_memory_does_not_allow_is_done_without(tmp_path):
    started = False

    def record(step):
        if started:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return step

    core = start(tmp_path, record=record, max_batch_size=2)
    started = True
    runner = core.executor._runner
    runner.graphs._graphs.clear()
    runner.mixed._graphs.clear()
    wanted = serve(start(tmp_path, runner='eager', max_batch_size=2), requests(10))
    assert serve(core, requests(10)) == wanted
    assert runner.graphs._given_up and runner.mixed._given_up


@pytest.mark.gpu
@pytest.mark.parametrize('options', [{}, {'num_blocks': 6}, {'max_step_tokens': 50}])
def test_graphs_give_what_the_eager_runner_gives(options, tmp_path):
    wanted = serve(start(tmp_path, device='cuda', runner='eager'), requests(45))
    core = start(tmp_path, device='cuda', **options)
    assert core.scheduler.capacity.choices['runner'] == 'graph'
    assert serve(core, requests(45)) == wanted


@pytest.mark.gpu
def test_a_thousand_mixed_requests_leave_nothing_behind(tmp_path):
    core = start(tmp_path, device='cuda', num_blocks=200, max_batch_size=64)
    serve(core, requests(1000), aborts=200)
    stats = core.stats()
    assert stats.cancelled > 0 and stats.finished + stats.cancelled == 1000


@pytest.mark.gpu
@pytest.mark.parametrize('runner', ['graph', 'eager'])
def test_nothing_is_compiled_after_the_start(runner, tmp_path, monkeypatch):
    from triton import knobs

    core = start(tmp_path, device='cuda', runner=runner, max_batch_size=80, num_blocks=800)
    compiled = []
    monkeypatch.setattr(knobs.runtime, 'jit_post_compile_hook', lambda *, fn, **_: compiled.append(fn.name))
    serve(core, requests(200))
    assert compiled == []


@pytest.mark.gpu
def test_a_stopped_runner_gives_its_memory_back(tmp_path):
    gc.collect()
    before = torch.cuda.memory_allocated()
    core = start(tmp_path, device='cuda', num_blocks=4000)
    serve(core, requests(5))
    used = torch.cuda.memory_allocated() - before
    core.executor.stop()
    del core
    gc.collect()
    assert torch.cuda.memory_allocated() - before < used / 10
