"""The memory plan is arithmetic: what the user named is honoured or refused, only defaults adapt."""

from __future__ import annotations

import re

import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.model import ModelConfig
from lmdeploy.errors import ConfigError
from lmdeploy.runner.memory import CPU_CACHE_CAP, Room, plan_memory, weight_bytes

GIB = 1 << 30
MODEL = ModelConfig.from_dict({
    'architectures': ['Qwen2ForCausalLM'], 'hidden_size': 896, 'intermediate_size': 4864, 'num_hidden_layers': 24,
    'num_attention_heads': 14, 'num_key_value_heads': 2, 'vocab_size': 151936, 'max_position_embeddings': 32768,
    'tie_word_embeddings': True, 'rms_norm_eps': 1e-6})  # fmt: skip
BLOCK = 24 * 2 * 64 * 64 * 2 * 2  # layers, key heads, tokens, head_dim, k and v, bytes

TIGHT = 1760 << 20  # enough for the weights and a part of the context


def plan(free=16 * GIB, *, gpu=False, total=0, **options):
    room = Room(free, total or free, on_cpu=not gpu)
    return plan_memory(EngineConfig(**options), MODEL, torch.bfloat16, room)


def refusal(code, **options):
    with pytest.raises(ConfigError) as caught:
        plan(**options)
    assert caught.value.code == code
    return caught.value


def test_weights_of_a_known_model():
    """Qwen2.5-0.5B has 494,032,768 parameters; a packed tied head is counted twice."""
    assert abs(weight_bytes(MODEL, 2, packed=False) / (2 * 494032768) - 1) < 1e-3
    assert weight_bytes(MODEL, 2, packed=True) - weight_bytes(MODEL, 2, packed=False) == 151936 * 896 * 2


def test_cpu_defaults_leave_room_for_a_second_pipeline():
    found = plan()
    assert found.block == BLOCK and found.cache <= CPU_CACHE_CAP
    assert (found.max_batch_size, found.session_len, found.max_step_tokens) == (16, 32768, 512)
    assert found.num_blocks * 64 >= found.session_len


def test_gpu_defaults():
    assert plan(free=20 * GIB, total=24 * GIB, gpu=True).max_batch_size == 128
    big = plan(free=130 * GIB, total=140 * GIB, gpu=True)
    assert (big.max_batch_size, big.max_step_tokens) == (512, 8192)
    assert big.weights + big.workspace + big.cache <= 130 * GIB


def test_a_default_session_shrinks_to_what_the_cache_holds():
    found = plan(free=TIGHT)
    assert 256 <= found.session_len < 32768 and found.session_len == found.num_blocks * 64


@pytest.mark.parametrize(('code', 'session_len'), [('LMD-201', 26_000), ('LMD-208', 32_768)])
def test_a_named_session_is_served_or_refused_with_sizes_that_work(code, session_len):
    assert plan(session_len=session_len).session_len == session_len
    error = refusal(code, free=TIGHT, session_len=session_len)
    fits = int(re.search(r'session_len=(\d+)', str(error)).group(1))
    assert plan(free=TIGHT, session_len=fits).session_len == fits
    refusal('LMD-201', free=TIGHT, session_len=fits + 1)
    more = float(re.search(r'free (\d+) MiB more', str(error)).group(1)) + 1
    assert plan(free=TIGHT + int(more * 2**20), session_len=session_len).session_len == session_len
    if code == 'LMD-201':
        blocks = int(re.search(r'cache_max_entry_count=(\d+)', str(error)).group(1))
        assert plan(free=TIGHT, session_len=session_len, num_blocks=blocks).num_blocks == blocks


def test_a_named_session_may_pass_the_cpu_cap():
    found = plan(free=64 * GIB, session_len=200_000)
    assert found.num_blocks >= 200_000 / 64 and found.cache > CPU_CACHE_CAP


def test_a_share_is_of_what_is_left_after_weights_and_workspace():
    found = plan(free=3 * GIB, cache_share=0.5, prefix_caching=True)
    left = 3 * GIB - found.weights - found.workspace
    assert 0.5 * left - 2 * BLOCK <= found.cache <= 0.5 * left


def test_no_more_blocks_than_full_sessions_unless_a_prefix_cache_uses_them():
    assert plan(session_len=100, max_batch_size=3).num_blocks == 6
    assert plan(session_len=100, max_batch_size=3, prefix_caching=True).num_blocks > 6


def test_a_named_number_of_blocks_is_honoured_or_refused():
    assert plan(num_blocks=50).num_blocks == 50
    assert plan(num_blocks=50).session_len == 3200
    assert plan(num_blocks=50, session_len=3200).session_len == 3200
    assert refusal('LMD-204', num_blocks=50, session_len=3201).params['needed'] == 51
    most = refusal('LMD-203', num_blocks=1 << 20).params['fits']
    assert plan(num_blocks=most).num_blocks == most
    refusal('LMD-203', num_blocks=most + 1)


def test_weights_that_do_not_fit_are_refused():
    assert 'bfloat16' in str(refusal('LMD-202', free=GIB))
    refusal('LMD-202', free=0)


def test_the_step_budget_is_an_upper_limit():
    assert plan(max_step_tokens=100).max_step_tokens == 100
    assert plan(max_step_tokens=100_000).max_step_tokens == 512


def test_a_measured_step_replaces_the_estimate():
    room = Room(20 * GIB, 24 * GIB, on_cpu=False)
    found = plan_memory(EngineConfig(), MODEL, torch.bfloat16, room, weights=0, workspace=3 * GIB)
    assert found.workspace == 3 * GIB and found.cache <= 0.8 * 17 * GIB < found.cache + 2 * found.block


def test_weights_that_are_stored_in_fewer_bytes_need_less():
    dense = weight_bytes(MODEL, 2, packed=False)
    assert weight_bytes(MODEL, 2, False, 2.0) == dense
    half = weight_bytes(MODEL, 2, False, 1.0)
    layers = 2 * (dense - half)  # of which half are saved
    assert weight_bytes(MODEL, 2, False, 0.5) == dense - layers * 3 // 4 and 0 < layers < dense
