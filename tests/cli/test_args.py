"""From flags to the public configs."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from lmdeploy import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.cli import args as cli_args
from lmdeploy.cli.args import ENGINE_OPTIONS, UsageError


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli_args.add_engine_arguments(parser)
    cli_args.add_generation_arguments(parser, GenerationConfig())
    return parser.parse_args(argv)


def test_no_flags_are_the_defaults_of_the_api():
    assert cli_args.engine_config(parse()) == TurbomindEngineConfig()
    assert cli_args.engine_config(parse('--backend', 'pytorch')) == PytorchEngineConfig()


def test_every_option_names_fields_that_exist():
    for option in ENGINE_OPTIONS:
        assert option.turbomind or option.pytorch
        assert option.turbomind is None or option.turbomind in {f.name for f in fields(TurbomindEngineConfig)}
        assert option.pytorch is None or option.pytorch in {f.name for f in fields(PytorchEngineConfig)}


def test_flags_reach_the_config():
    shared = ['--dtype', 'float32', '--tp', '2', '--session-len', '4096', '--cache-max-entry-count', '0.5',
              '--enable-prefix-caching', '--quant-policy', '8', '--model-format', 'awq', '--revision', 'v1',
              '--download-dir', '/models', '--max-batch-size', '4', '--cache-block-seq-len', '128',
              '--max-prefill-token-num', '512']
    common = {'dtype': 'float32', 'tp': 2, 'session_len': 4096, 'cache_max_entry_count': 0.5,
              'enable_prefix_caching': True, 'quant_policy': 8, 'model_format': 'awq', 'revision': 'v1',
              'download_dir': '/models', 'max_batch_size': 4, 'max_prefill_token_num': 512}
    assert cli_args.engine_config(parse(*shared, '--rope-scaling-factor', '2', '--communicator', 'native')) == \
        TurbomindEngineConfig(**common, cache_block_seq_len=128, rope_scaling_factor=2.0, communicator='native')
    assert cli_args.engine_config(parse(*shared, '--device', 'cpu', '--eager-mode', '--adapters', 'a=/x', 'b=/y')) == \
        PytorchEngineConfig(**common, block_size=128, device_type='cpu', eager_mode=True,
                            adapters={'a': '/x', 'b': '/y'})


@pytest.mark.parametrize('text, value', [('0.8', 0.8), ('200', 200), ('1', 1)])
def test_cache_is_a_share_or_a_number_of_blocks(text, value):
    got = cli_args.engine_config(parse('--cache-max-entry-count', text)).cache_max_entry_count
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('argv', [
    ('--backend', 'turbomind', '--eager-mode'),
    ('--backend', 'pytorch', '--communicator', 'nccl'),
    ('--device', 'cpu', '--rope-scaling-factor', '2'),
])
def test_flags_of_two_backends_are_refused(argv):
    with pytest.raises(UsageError) as raised:
        cli_args.engine_config(parse(*argv))
    assert raised.value.code == 'LMD-406'


@pytest.mark.parametrize('pair', ['name', 'name=', '=path'])
def test_adapters_need_a_name_and_a_path(pair):
    with pytest.raises(UsageError) as raised:
        cli_args.engine_config(parse('--adapters', pair))
    assert raised.value.code == 'LMD-409'


def test_chat_samples():
    gen = cli_args.generation_config(parse('--temperature', '0', '--top-p', '0.5', '--top-k', '3', '--seed', '7',
                                           '--max-new-tokens', '9', '--repetition-penalty', '1.1'))
    assert gen == GenerationConfig(do_sample=True, temperature=0.0, top_p=0.5, top_k=3, random_seed=7, max_new_tokens=9,
                                   repetition_penalty=1.1)


def test_template_by_name_or_file(tmp_path):
    assert cli_args.template_config(parse()) is None
    assert cli_args.template_config(parse('--chat-template', 'llama3')).model_name == 'llama3'
    file = tmp_path / 'template.json'
    file.write_text('{"model_name": "base", "system": "S:", "stop_words": ["###"]}')
    config = cli_args.template_config(parse('--chat-template', str(file)))
    assert (config.model_name, config.system, config.stop_words) == ('base', 'S:', ['###'])
