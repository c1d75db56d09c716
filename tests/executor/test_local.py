"""The whole device side behind the engine: the same answers as transformers, however the work is cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import ConfigError, LoadError, RequestError
from lmdeploy.executor.local import LocalExecutor
from tests.models.tiny import VOCAB, load_reference, make_tiny

NEW = 24
generator = np.random.default_rng(0)
PROMPTS = [generator.integers(3, VOCAB, n).tolist() for n in (1, 7, 40, 63, 64, 65, 130)]
SAMPLING = [
    {}, {'greedy': False, 'seed': 1}, {'greedy': False, 'temperature': 0.7, 'top_k': 40, 'top_p': 0.8, 'seed': 2},
    {'repetition_penalty': 1.3, 'frequency_penalty': 0.2}, {'greedy': False, 'min_p': 0.1, 'seed': 3},
    {'bad_sequences': ((5, 6), (7,)), 'presence_penalty': 0.5}, {'greedy': False, 'seed': 4, 'logprobs': 2},
]  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_tiny('Qwen2ForCausalLM', tmp_path_factory.mktemp('local') / 'model', tie_word_embeddings=False)


def engine(folder, *, depth=1, prefix_caching=False, **options):
    config = EngineConfig(**({'dtype': 'float32', 'device': 'cpu', 'num_blocks': 40} | options))
    executor = LocalExecutor(config, folder)
    return EngineCore(executor, executor.start(), depth=depth, prefix_caching=prefix_caching)


def answer(core, requests):
    """Run ``(prompt, params)`` together; by index: tokens, and the deltas."""
    for index, (prompt, params) in enumerate(requests):
        core.submit(EngineInput(str(index), prompt, SamplingParams(**({'max_new_tokens': NEW} | params))))
    deltas = [[] for _ in requests]
    while not core.idle:
        for delta in core.step():
            deltas[int(delta.id)].append(delta)
    core.check()
    return [[token for delta in got for token in delta.tokens] for got in deltas], deltas


@pytest.fixture(scope='module')
def alone(folder):
    """Every request by itself, in the plainest engine."""
    tokens = [answer(engine(folder), [(prompt, params)])[0][0] for prompt, params in zip(PROMPTS, SAMPLING)]
    assert all(len(set(found)) > 5 for found in tokens), 'answers that repeat themselves would prove little'
    return tokens


def test_greedy_tokens_are_those_of_transformers(folder):
    model = load_reference(folder)
    tokens, _ = answer(engine(folder), [(prompt, {}) for prompt in PROMPTS])
    for prompt, found in zip(PROMPTS, tokens):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert found == wanted[0, len(prompt):].tolist()


@pytest.mark.parametrize('options', [
    {}, {'depth': 2}, {'max_step_tokens': 9}, {'max_step_tokens': 9, 'depth': 2}, {'prefix_caching': True},
    {'num_blocks': 5, 'depth': 2}, {'max_batch_size': 2}, {'block_size': 128},
    {'num_blocks': 4, 'max_step_tokens': 40},
], ids=str)  # fmt: skip
def test_answers_do_not_depend_on_how_the_work_is_cut_up(folder, alone, options):
    core = engine(folder, **options)
    for _ in range(2):  # the second round finds the first one's prefixes
        assert answer(core, list(zip(PROMPTS, SAMPLING)))[0] == alone
    if options.get('num_blocks') == 5:
        assert core.stats().preemptions > 0


def test_logits_and_hidden_rows_of_all_positions(folder):
    model = load_reference(folder)
    prompt = PROMPTS[3]
    for options in ({}, {'max_step_tokens': 10, 'depth': 2}):
        wishes = {'output_logits': 'all', 'output_hidden': 'all', 'max_new_tokens': 5}
        core = engine(folder, **options)
        tokens, deltas = answer(core, [(prompt, wishes), (PROMPTS[4], {'output_logits': 'generation'})])
        with torch.inference_mode():
            wanted = model(torch.tensor([prompt + tokens[0]]), output_hidden_states=True)
        logits = torch.cat([d.logits for d in deltas[0] if d.logits is not None])
        hidden = torch.cat([d.hidden for d in deltas[0] if d.hidden is not None])
        assert logits.dtype == hidden.dtype == torch.float32 and len(logits) == len(hidden) == len(prompt) + 4
        torch.testing.assert_close(logits, wanted.logits[0, :-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(hidden, wanted.hidden_states[-1][0, :-1], atol=1e-4, rtol=1e-4)
        generated = torch.cat([d.logits for d in deltas[1]])
        assert generated.argmax(-1).tolist() == tokens[1]


def test_logprobs_are_those_of_the_model(folder):
    model = load_reference(folder)
    tokens, deltas = answer(engine(folder), [(PROMPTS[2], {'greedy': False, 'seed': 8, 'logprobs': 3})])
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPTS[2] + tokens[0]])).logits[0, len(PROMPTS[2]) - 1:-1].log_softmax(-1)
    chosen = np.concatenate([d.logprobs.chosen for d in deltas[0]])
    best = np.concatenate([d.logprobs.values for d in deltas[0]])
    np.testing.assert_allclose(chosen, wanted.gather(-1, torch.tensor(tokens[0])[:, None]).squeeze(-1), atol=1e-3)
    np.testing.assert_allclose(best, wanted.topk(3).values, atol=1e-3)


def test_a_poisoned_request_fails_alone_and_leaves_the_cache_clean(folder):
    core = engine(folder, prefix_caching=True)
    with torch.inference_mode():
        core.executor._runner.model.embedding.weight[7] = float('nan')
    good = [p for p in PROMPTS if 7 not in p]
    before = [answer(core, [(p, {'banned_ids': (7,)})])[0][0] for p in good]
    _, deltas = answer(core, [(p, {'banned_ids': (7,)}) for p in [*good, [9, 7]]])
    assert deltas[-1][-1].finish.reason == 'error'
    assert [[t for d in got for t in d.tokens] for got in deltas[:-1]] == before
    assert answer(core, [(p, {'banned_ids': (7,)}) for p in good])[0] == before


def test_memory_that_runs_out_once_is_survived_and_twice_is_the_end_of_the_requests_of_that_step(folder, monkeypatch):
    core = engine(folder)
    runner, wanted = core.executor._runner, answer(core, [(PROMPTS[1], {})])[0]
    step, failures = runner._step, [1]

    def failing(*args):
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return step(*args)

    monkeypatch.setattr(runner, '_step', failing)
    assert answer(core, [(PROMPTS[1], {})])[0] == wanted
    failures[0] = 2
    _, deltas = answer(core, [(PROMPTS[1], {})])
    error = deltas[0][-1].finish.error
    assert isinstance(error, RequestError) and error.code == 'LMD-207'
    assert core.scheduler.idle and not core.stats().used_blocks
    assert answer(core, [(PROMPTS[1], {})])[0] == wanted


def test_capacity_says_what_runs(folder):
    executor = LocalExecutor(EngineConfig(dtype='float32', device='cpu', runner='graph', session_len=200), folder)
    capacity = executor.start()
    assert capacity.session_len == 200 and capacity.max_batch_size == 16 and capacity.device == 'cpu'
    assert capacity.choices['runner'] == 'eager' and capacity.choices['dtype'] == 'float32'
    assert {'attention', 'linear', 'threads'} <= set(capacity.choices)
    assert executor.call('choices') == [capacity.choices]
    assert executor.model_config.architecture == 'Qwen2ForCausalLM'
    executor.stop()
    executor.stop()


@pytest.mark.parametrize(('options', 'code'), [
    ({'dtype': 'float16'}, 'LMD-205'), ({'num_blocks': 3, 'session_len': 400}, 'LMD-204'),
    ({'num_blocks': 1 << 24}, 'LMD-203'), ({'session_len': 1 << 24}, 'LMD-208'),
])  # fmt: skip
def test_options_are_refused_before_a_weight_is_read(folder, options, code, monkeypatch):
    executor = LocalExecutor(EngineConfig(device='cpu', **options), folder)
    monkeypatch.setattr('lmdeploy.runner.model_runner.build_model', lambda *args: pytest.fail('too late'))
    monkeypatch.setattr('lmdeploy.runner.memory.free_host_memory', lambda: (1 << 30, 1 << 30))
    with pytest.raises(ConfigError) as caught:
        executor.start()
    assert caught.value.code == code and caught.value.text('zh')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_device_that_is_not_there(folder):
    with pytest.raises(ConfigError) as caught:
        LocalExecutor(EngineConfig(device='cuda'), folder).start()
    assert caught.value.code == 'LMD-206'


def test_left_over_weights_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / 'model.safetensors')
    save_file(tensors | {'model.layers.9.extra': torch.zeros(2)}, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    with pytest.raises(LoadError, match='model.layers.9.extra'):
        LocalExecutor(EngineConfig(device='cpu', num_blocks=8), tmp_path).start()


def test_memory_that_runs_out_at_the_start_says_where(folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr('lmdeploy.runner.model_runner.KVCache', full)
    with pytest.raises(ConfigError) as caught:
        LocalExecutor(EngineConfig(dtype='float32', device='cpu'), folder).start()
    assert caught.value.code == 'LMD-210' and 'KV cache' in str(caught.value)
