"""ModelConfig: what real configs mean, and that no field of one can do harm."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.config.model import FAMILIES, FULL, SLIDING, ModelConfig, context_len
from lmdeploy.errors import ConfigError

LLAMA = {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_size': 2048, 'intermediate_size': 8192,
    'num_hidden_layers': 16, 'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 64, 'vocab_size': 128256,
    'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5, 'rope_theta': 500000.0, 'tie_word_embeddings': True,
    'attention_bias': False, 'mlp_bias': False, 'hidden_act': 'silu', 'torch_dtype': 'bfloat16', 'bos_token_id': 128000,
    'eos_token_id': [128001, 128008, 128009],
    'rope_scaling': {'rope_type': 'llama3', 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                     'original_max_position_embeddings': 8192},
}  # fmt: skip
GEMMA3 = {
    'architectures': ['Gemma3ForConditionalGeneration'], 'model_type': 'gemma3', 'eos_token_id': [1, 106],
    'torch_dtype': 'bfloat16',
    'text_config': {'hidden_size': 2560, 'intermediate_size': 10240, 'num_hidden_layers': 34, 'sliding_window': 1024,
                    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}},
}  # fmt: skip
QWEN3 = {
    'architectures': ['Qwen3ForCausalLM'], 'hidden_size': 1024, 'intermediate_size': 3072, 'num_hidden_layers': 4,
    'num_attention_heads': 16, 'num_key_value_heads': 8, 'vocab_size': 151936, 'max_position_embeddings': 40960,
    'rms_norm_eps': 1e-6, 'dtype': 'bfloat16', 'use_sliding_window': True, 'sliding_window': 4096,
    'max_window_layers': 3, 'eos_token_id': 151645, 'quantization_config': None,
    'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 4.0, 'beta_fast': 32, 'beta_slow': 1,
                        'original_max_position_embeddings': 32768, 'attention_factor': 1.1, 'truncate': False},
}  # fmt: skip
INTERNLM3 = {
    'architectures': ['InternLM3ForCausalLM'], 'hidden_size': 4096, 'intermediate_size': 10240, 'num_hidden_layers': 48,
    'num_attention_heads': 32, 'num_key_value_heads': 2, 'head_dim': 128, 'vocab_size': 128512, 'bias': False,
    'qkv_bias': False, 'max_position_embeddings': 32768, 'rms_norm_eps': 1e-5, 'rope_theta': 50000000,
    'rope_scaling': {'factor': 6.0, 'rope_type': 'dynamic'}, 'torch_dtype': 'bfloat16', 'hidden_act': 'silu',
}  # fmt: skip
GOOD = {'llama': LLAMA, 'gemma3': GEMMA3, 'qwen3': QWEN3, 'internlm3': INTERNLM3}


def read(config, **options) -> ModelConfig:
    return ModelConfig.from_dict(config, **options)


def without(config, name):
    return {k: v for k, v in config.items() if k != name}


def code_of(config, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        read(config, **options)
    return caught.value.code


def test_llama():
    config = read(LLAMA)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 64)
    assert (config.rope.rope_type, config.rope.factor, config.rope.original) == ('llama3', 32.0, 8192)
    assert config.layer_types == (FULL,) * 16 and config.sliding_window == 0
    assert config.eos_token_ids == (128001, 128008, 128009) and config.bos_token_id == 128000
    assert config.dtype_name == 'bfloat16' and config.tie_word_embeddings and not config.qkv_bias
    assert config.attention_scalar == 64.0 and config.context_len == 131072


def test_gemma3_text_part_with_what_its_config_leaves_out():
    config = read(GEMMA3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.layer_types[:7] == (SLIDING,) * 5 + (FULL, SLIDING) and config.sliding_window == 1024
    assert (config.rope.rope_type, config.rope.theta, config.rope.factor) == ('linear', 1e6, 8.0)
    assert (config.local_rope.rope_type, config.local_rope.theta) == ('default', 1e4)
    assert config.activation == 'gelu_tanh' and config.tie_word_embeddings and config.eos_token_ids == (1, 106)


def test_qwen3_windows_of_upper_layers_and_joined_rope_parameters():
    config = read(QWEN3)
    assert config.head_dim == 128 and config.layer_types == (FULL, FULL, FULL, SLIDING)
    assert (config.rope.rope_type, config.rope.attention_factor, config.rope.truncate) == ('yarn', 1.1, False)
    assert set(read(without(QWEN3, 'use_sliding_window')).layer_types) == {FULL}


def test_dynamic_rope_is_fixed_by_the_session_length():
    assert read(INTERNLM3).rope.length == 32768
    long = read(INTERNLM3, session_len=100_000).rope
    assert (long.original, long.length, long.factor) == (32768, 100_000, 6.0)
    plain = without(INTERNLM3, 'rope_scaling')
    assert read(plain).rope.rope_type == 'default'
    stretched = read(plain, session_len=160_000, rope_scaling_factor=2.5).rope
    assert (stretched.rope_type, stretched.factor, stretched.length) == ('dynamic', 2.5, 160_000)


@pytest.mark.parametrize(('config', 'length'), [
    ({'max_position_embeddings': 4096, 'seq_length': 2048}, 2048),
    ({'n_positions': 100}, 100),
    ({}, 2048),
    ({'max_position_embeddings': 5, 'llm_config': {'max_position_embeddings': 300}}, 300),
    ({'language_config': {'model_max_length': 7}, 'text_config': {'max_position_embeddings': 9}}, 7),
])  # fmt: skip
def test_context_length_is_the_smallest_that_is_named(config, length):
    assert context_len(config) == length


@pytest.mark.parametrize(('change', 'code'), [
    ({'architectures': ['GPT5ForCausalLM']}, 'LMD-110'),
    ({'architectures': None}, 'LMD-112'),
    ({'architectures': []}, 'LMD-112'),
    ({'rope_scaling': {'rope_type': 'longrope', 'factor': 4.0}}, 'LMD-111'),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 4.0}}, 'LMD-112'),
    ({'rope_scaling': LLAMA['rope_scaling'] | {'high_freq_factor': 1.0}}, 'LMD-114'),
    ({'rope_scaling': {'rope_type': 'frequency_factors', 'factors': [1.0] * 31}}, 'LMD-113'),
    ({'rope_scaling': 3}, 'LMD-113'),
    ({'hidden_size': None}, 'LMD-112'),
    ({'hidden_size': 2048.5}, 'LMD-113'),
    ({'hidden_size': True}, 'LMD-113'),
    ({'num_key_value_heads': 5}, 'LMD-114'),
    ({'head_dim': None, 'num_attention_heads': 24, 'num_key_value_heads': 24}, 'LMD-114'),
    ({'partial_rotary_factor': 0.01}, 'LMD-113'),
    ({'hidden_act': 'relu'}, 'LMD-115'),
    ({'final_logit_softcapping': 30.0}, 'LMD-115'),
    ({'torch_dtype': 'float64'}, 'LMD-115'),
    ({'quantization_config': {'quant_method': 'exl3'}}, 'LMD-116'),
    ({'rms_norm_eps': float('nan')}, 'LMD-113'),
    ({'rope_theta': float('inf')}, 'LMD-113'),
])  # fmt: skip
def test_bad_fields_are_refused_by_name(change, code):
    assert code_of(LLAMA | change) == code


def test_a_config_that_is_no_object():
    for config in (None, [], 'llama', 3):
        assert code_of(config) == 'LMD-117'


def test_messages_name_field_and_value():
    with pytest.raises(ConfigError, match='num_hidden_layers = -3, but it must be a whole number from 1 to 1024'):
        read(LLAMA | {'num_hidden_layers': -3})
    nested = copy.deepcopy(GEMMA3)
    nested['text_config']['rope_scaling']['factor'] = 0
    with pytest.raises(ConfigError, match=r'text_config\.rope_scaling\.factor = 0'):
        read(nested)
    with pytest.raises(ConfigError) as caught:
        read({'architectures': ['X' * 1000]})
    assert all(name in str(caught.value) for name in FAMILIES) and len(str(caught.value)) < 600


def paths(value, prefix=()):
    """The paths of all fields of nested objects."""
    for key, inner in value.items():
        yield (*prefix, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*prefix, key))


WHERE = [(name, path) for name, config in GOOD.items() for path in paths(config)]
VALUES = st.one_of(
    st.sampled_from([None, 0, -1, 10**9, 10**30, 1.5, True, '', 'x', [], {}, [None], {'factor': None}, 'delete',
                     float('nan'), float('inf'), [[]], [10**9], b'', 1e308]),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(WHERE), VALUES), min_size=1, max_size=3))
@settings(max_examples=600, deadline=1000)
def test_any_change_is_read_or_refused(changes):
    configs = copy.deepcopy(GOOD)
    for (name, path), value in changes:
        target = configs[name]
        for key in path[:-1]:
            target = target.get(key) if isinstance(target, dict) else None
        if isinstance(target, dict):
            if value == 'delete':
                target.pop(path[-1], None)
            else:
                target[path[-1]] = value
    for config in configs.values():
        try:
            found = read(config)
        except ConfigError:
            continue
        sizes = [getattr(found, f.name) for f in fields(found) if isinstance(getattr(found, f.name), int)]
        assert all(0 <= size < 1 << 28 for size in sizes) and found.head_dim <= 1024
        assert len(found.layer_types) == found.num_layers <= 1024
