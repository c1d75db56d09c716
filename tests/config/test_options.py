"""The table from public engine options to the internal config is complete, and no value is ignored in silence."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.options import TABLES, normalise
from lmdeploy.errors import ConfigError

BOTH = (TurbomindEngineConfig, PytorchEngineConfig)


@pytest.mark.parametrize('public', BOTH)
def test_the_table_names_every_public_field_and_no_other(public):
    assert set(TABLES[public]) == {spec.name for spec in fields(public)}


@pytest.mark.parametrize('public', BOTH)
def test_honoured_fields_set_fields_of_the_internal_config(public):
    internal = {spec.name for spec in fields(EngineConfig)}
    for name, rule in TABLES[public].items():
        if rule.set is not None:
            default = next(spec.default for spec in fields(public) if spec.name == name)
            assert set(rule.set(name, default)) <= internal, name


def test_both_spellings_of_one_wish_agree():
    turbomind = TurbomindEngineConfig(session_len=4096, max_batch_size=4, cache_max_entry_count=0.5,
                                      enable_prefix_caching=True, cache_block_seq_len=128, dtype='float32',
                                      max_prefill_token_num=256)
    pytorch = PytorchEngineConfig(session_len=4096, max_batch_size=4, cache_max_entry_count=0.5,
                                  enable_prefix_caching=True, block_size=128, dtype='float32',
                                  max_prefill_token_num=256)
    assert normalise(turbomind) == normalise(pytorch)


def test_runner_device_and_block_count():
    assert normalise(None).runner == 'graph'
    assert normalise(PytorchEngineConfig(eager_mode=True)).runner == 'eager'
    assert normalise(PytorchEngineConfig()).device == 'auto'
    assert normalise(PytorchEngineConfig(device_type='cpu')).device == 'cpu'
    assert normalise(PytorchEngineConfig(num_gpu_blocks=12)).num_blocks == 12
    assert normalise(PytorchEngineConfig(num_gpu_blocks=0)).num_blocks is None
    assert normalise(TurbomindEngineConfig(cache_max_entry_count=40)).num_blocks == 40


@pytest.mark.parametrize(('public', 'options', 'code'), [
    (PytorchEngineConfig, {'dtype': 'int3'}, 'LMD-221'),
    (PytorchEngineConfig, {'dtype': ['auto']}, 'LMD-221'),
    (PytorchEngineConfig, {'eager_mode': 'yes'}, 'LMD-221'),
    (TurbomindEngineConfig, {'quant_policy': 3}, 'LMD-221'),
    (TurbomindEngineConfig, {'quant_policy': True}, 'LMD-221'),
    (TurbomindEngineConfig, {'session_len': -1}, 'LMD-222'),
    (TurbomindEngineConfig, {'session_len': 0}, 'LMD-222'),
    (TurbomindEngineConfig, {'session_len': 10**12}, 'LMD-222'),
    (TurbomindEngineConfig, {'session_len': 8192.0}, 'LMD-222'),
    (TurbomindEngineConfig, {'max_batch_size': 0}, 'LMD-222'),
    (TurbomindEngineConfig, {'cache_max_entry_count': float('nan')}, 'LMD-223'),
    (TurbomindEngineConfig, {'cache_max_entry_count': 1.0}, 'LMD-223'),
    (TurbomindEngineConfig, {'cache_max_entry_count': 0}, 'LMD-223'),
    (TurbomindEngineConfig, {'cache_max_entry_count': '0.8'}, 'LMD-223'),
    (TurbomindEngineConfig, {'cache_block_seq_len': 48}, 'LMD-224'),
    (PytorchEngineConfig, {'block_size': 16}, 'LMD-224'),
    (TurbomindEngineConfig, {'rope_scaling_factor': 0.5}, 'LMD-225'),
    (TurbomindEngineConfig, {'tp': 0}, 'LMD-222'),
    (PytorchEngineConfig, {'adapters': {'a': 'b'}}, 'LMD-227'),
    (PytorchEngineConfig, {'role': 'Prefill'}, 'LMD-227'),
    (PytorchEngineConfig, {'dp': 2}, 'LMD-227'),
    (TurbomindEngineConfig, {'use_logn_attn': True}, 'LMD-227'),
])
def test_impossible_and_unsupported_values_are_refused_by_name(public, options, code):
    with pytest.raises(ConfigError) as caught:
        normalise(public(**options))
    assert caught.value.code == code
    assert next(iter(options)) in str(caught.value)


def test_something_else_than_a_config_is_refused():
    with pytest.raises(ConfigError, match='LMD-220'):
        normalise({'tp': 1})


def test_hints_are_accepted():
    assert normalise(TurbomindEngineConfig(num_tokens_per_iter=512, communicator='native')) == normalise(None)
    assert normalise(PytorchEngineConfig(prefill_interval=4, thread_safe=True)) == normalise(PytorchEngineConfig())


ANY = st.one_of(st.none(), st.booleans(), st.integers(-10**12, 10**12), st.floats(), st.text(max_size=8),
                st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=1))


@pytest.mark.parametrize('public', BOTH)
@given(data=st.data())
def test_any_value_of_any_field_is_honoured_or_a_config_error(public, data):
    name = data.draw(st.sampled_from(sorted(TABLES[public])))
    try:
        assert isinstance(normalise(public(**{name: data.draw(ANY)})), EngineConfig)
    except ConfigError as error:
        assert error.params.get('field') == name
