"""GGUF models: names, layouts and configuration come out as a Hugging Face checkpoint of the same model has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy.config.model import ModelConfig
from lmdeploy.errors import LoadError
from lmdeploy.weights.checkpoint import open_checkpoint
from lmdeploy.weights.gguf_config import shortest_float32
from lmdeploy.weights.gguf_names import ARCHITECTURES
from tests.weights.files import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, write_gguf

CASES = [
    ('llama', {}),
    ('llama', {'tied': True, 'bias': True}),
    ('llama', {'kind': 'Q5_1'}),
    ('llama', {'kind': 'F16'}),
    ('internlm2', {}),
    ('qwen2', {'bias': True}),
    ('qwen2', {'bias': True, 'kind': 'Q8_0', 'tied': True}),
    ('qwen3', {'kind': 'BF16'}),
    ('gemma3', {'tied': True}),
    ('gemma3', {'tied': True, 'kind': 'Q4_1'}),
]


def config_of(path: Path, arch: str = 'llama', **options: Any) -> dict[str, Any]:
    write_gguf(path, arch, **options)
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config


def failure(path: Path, arch: str = 'llama', **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        config_of(path, arch, **options)
    assert path.name in str(caught.value)
    return caught.value


@pytest.mark.parametrize(('arch', 'options'), CASES, ids=lambda value: str(value))
def test_tensors(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    path = tmp_path / 'x.gguf'
    wanted = write_gguf(path, arch, **options)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.names() == sorted(wanted)
        for name, value in wanted.items():
            found = checkpoint.get(name, value.shape, torch.float32)
            assert np.array_equal(found.numpy().view(np.uint32), value.view(np.uint32)), name
        checkpoint.finish()


@pytest.mark.parametrize(('arch', 'bias'), [('llama', False), ('qwen2', True), ('qwen3', False), ('gemma3', False)])
def test_transformers_loads_the_same_weights(tmp_path: Path, arch: str, bias: bool) -> None:
    """... into a model built from our configuration, which therefore has the right sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path / 'x.gguf'
    write_gguf(path, arch, tied=arch == 'gemma3', bias=bias, kind='Q4_0')
    with open_checkpoint(path) as checkpoint:
        config = AutoConfig.for_model(**checkpoint.config)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, config=config, dtype=torch.float32, attn_implementation='eager'
        )
        wanted = model.state_dict()
        assert checkpoint.config['architectures'] == [type(model).__name__]
        for name in checkpoint.names():
            assert torch.equal(checkpoint.get(name, dtype=torch.float32), wanted[name]), name
        assert wanted.keys() - set(checkpoint.names()) <= {'lm_head.weight'}


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_config(tmp_path: Path, arch: str) -> None:
    config = config_of(tmp_path / 'x.gguf', arch, tied=arch == 'gemma3')
    expected = {
        'architectures': [ARCHITECTURES[arch].hf_class],
        'hidden_size': HIDDEN,
        'intermediate_size': FFN,
        'num_hidden_layers': LAYERS,
        'num_attention_heads': HEADS,
        'num_key_value_heads': KV_HEADS,
        'head_dim': HEAD_DIM,
        'vocab_size': VOCAB,
        'max_position_embeddings': 256,
        'rms_norm_eps': 1e-6,
        'rope_theta': 500000.0,
        'rope_scaling': None,
        'tie_word_embeddings': arch == 'gemma3',
        'attention_bias': False,
        'torch_dtype': 'float32',
        'bos_token_id': 1,
        'eos_token_id': 2,
    }
    assert {key: config[key] for key in expected} == expected
    if arch == 'gemma3':
        assert config['sliding_window'] == 64 and config['sliding_window_pattern'] == 6
        assert config['query_pre_attn_scalar'] == HEAD_DIM and config['rope_local_base_freq'] == 10000.0
        assert config['hidden_activation'] == 'gelu_pytorch_tanh'
    assert ModelConfig.from_dict(config).architecture == config['architectures'][0]


def test_facts_that_only_tensors_tell(tmp_path: Path) -> None:
    config = config_of(tmp_path / 'x.gguf', 'llama', tied=True, bias=True, kind='F16')
    assert config['tie_word_embeddings'] and config['attention_bias'] and config['torch_dtype'] == 'float16'
    assert config_of(tmp_path / 'y.gguf', 'llama', kind='Q8_0')['torch_dtype'] == 'bfloat16'


def test_defaults(tmp_path: Path) -> None:
    extra = {'arch.attention.head_count': 2, 'arch.attention.head_count_kv': None, 'arch.attention.key_length': None,
             'arch.rope.freq_base': None}  # fmt: skip
    config = config_of(tmp_path / 'x.gguf', 'qwen2', extra=extra)
    assert config['head_dim'] == HIDDEN // 2 and config['num_key_value_heads'] == 2 and config['rope_theta'] == 10000.0


def test_counts_per_layer_must_agree(tmp_path: Path) -> None:
    path = tmp_path / 'x.gguf'
    assert config_of(path, extra={'arch.feed_forward_length': [FFN, FFN]})['intermediate_size'] == FFN
    error = failure(path, extra={'arch.attention.head_count_kv': [2, 4]})
    assert error.code == 'LMD-138' and 'head_count_kv' in str(error)


@pytest.mark.parametrize(
    ('extra', 'told'),
    [
        ({'arch.block_count': None}, 'block_count'),
        ({'arch.embedding_length': 'wide'}, 'embedding_length'),
        ({'arch.context_length': 1.5}, 'context_length'),
        ({'arch.attention.layer_norm_rms_epsilon': None}, 'layer_norm_rms_epsilon'),
        ({'arch.attention.layer_norm_rms_epsilon': float('nan')}, 'layer_norm_rms_epsilon'),
        ({'arch.rope.freq_base': 0.0}, 'freq_base'),
        ({'arch.rope.freq_base': float('inf')}, 'freq_base'),
        ({'arch.attention.head_count': 0}, 'head_count'),
        ({'arch.attention.head_count': 7}, 'head_count'),
        ({'arch.attention.key_length': None, 'arch.attention.head_count': 7}, 'head_count'),
        ({'arch.attention.value_length': 16}, 'value_length'),
        ({'arch.rope.dimension_count': 16}, 'dimension_count'),
        ({'arch.rope.scaling.type': 'yarn', 'arch.rope.scaling.factor': -1.0}, 'scaling.factor'),
        ({'split.count': 3}, 'split.count'),
        ({'tokenizer.ggml.eos_token_id': 'two'}, 'eos_token_id'),
    ],
)
def test_bad_metadata(tmp_path: Path, extra: dict[str, Any], told: str) -> None:
    error = failure(tmp_path / 'x.gguf', extra=extra)
    assert error.code == 'LMD-138' and told in str(error)


def test_unknown_architecture(tmp_path: Path) -> None:
    error = failure(tmp_path / 'x.gguf', extra={'general.architecture': 'gemma2'})
    assert error.code == 'LMD-137' and 'gemma2' in str(error) and 'qwen3' in str(error)


def test_tensor_type_without_dequantisation(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / 'x.gguf'
    writer = gguf.GGUFWriter(path, 'llama')
    for key in ('context_length', 'embedding_length', 'feed_forward_length', 'block_count', 'attention.head_count'):
        writer.add_uint32(f'llama.{key}', 256)
    writer.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
    writer.add_tensor('token_embd.weight', np.zeros((2, 84), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoadError) as caught:
        open_checkpoint(path)
    assert caught.value.code == 'LMD-131' and 'Q2_K' in str(caught.value) and 'Q4_K' in str(caught.value)


def test_tensors_no_table_knows_are_left_over(tmp_path: Path) -> None:
    path = tmp_path / 'x.gguf'
    extra = {name: np.zeros(4, np.float32) for name in ('blk.0.ffn_gate_inp.weight', 'blk.x.attn_q.weight', 'odd')}
    wanted = write_gguf(path, extra_tensors=extra)
    with open_checkpoint(path) as checkpoint:
        for name in wanted:
            checkpoint.get(name)
        assert checkpoint.leftover() == sorted(extra)


def test_end_tokens(tmp_path: Path) -> None:
    path = tmp_path / 'x.gguf'
    write_gguf(path)
    assert open_checkpoint(path).generation_config == {}
    write_gguf(path, extra={'tokenizer.ggml.eot_token_id': 7, 'tokenizer.ggml.eom_token_id': 2})
    assert open_checkpoint(path).generation_config == {'eos_token_id': [2, 7]}


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """The divisors as llama.cpp's converter computes them, in float32."""
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    original, factor = scaling['original_max_position_embeddings'], scaling['factor']
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(factors, np.float32)


@pytest.mark.parametrize('factor', [8.0, 32.0])
@pytest.mark.parametrize('original', [8192, 4096])
def test_llama3_rope_is_recovered_from_its_divisors(tmp_path: Path, factor: float, original: int) -> None:
    scaling = {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
               'original_max_position_embeddings': original}  # fmt: skip
    factors = llama3_factors(scaling, 500000.0, HEAD_DIM)
    path = tmp_path / 'x.gguf'
    assert config_of(path, extra_tensors={'rope_freqs.weight': factors})['rope_scaling'] == scaling
    assert 'rope_freqs.weight' not in open_checkpoint(path).names()


def test_other_rope_divisors(tmp_path: Path) -> None:
    path = tmp_path / 'x.gguf'
    factors = np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)
    scaling = config_of(path, extra_tensors={'rope_freqs.weight': factors})['rope_scaling']
    assert scaling == {'rope_type': 'frequency_factors', 'factors': factors.tolist()}
    for bad in (factors[:-1], factors * 0, factors * np.float32('nan')):
        assert failure(path, extra_tensors={'rope_freqs.weight': bad}).code == 'LMD-138'


@pytest.mark.parametrize(
    ('extra', 'scaling'),
    [
        ({'type': 'none'}, None),
        ({'type': 'linear', 'factor': 1.0}, None),
        ({'type': 'linear', 'factor': 4.0}, {'rope_type': 'linear', 'factor': 4.0}),
        ({'type': 'longrope', 'factor': 4.0}, {'rope_type': 'longrope', 'factor': 4.0}),
        (
            {'type': 'yarn', 'factor': 4.0, 'original_context_length': 128, 'yarn_beta_fast': 32.0},
            {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 128, 'beta_fast': 32.0},
        ),
        (
            {'type': 'yarn', 'factor': 2.0, 'yarn_beta_slow': 1.5},
            {'rope_type': 'yarn', 'factor': 2.0, 'beta_slow': 1.5},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, extra: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    extra = {f'arch.rope.scaling.{key}': value for key, value in extra.items()}
    assert config_of(tmp_path / 'x.gguf', extra=extra)['rope_scaling'] == scaling


def test_rope_scaling_of_old_files(tmp_path: Path) -> None:
    scaling = config_of(tmp_path / 'x.gguf', extra={'arch.rope.scale_linear': 2.0})['rope_scaling']
    assert scaling == {'rope_type': 'linear', 'factor': 2.0}


def test_yarn_attention_factor_multiplies_the_usual_one(tmp_path: Path) -> None:
    extra = {'type': 'yarn', 'factor': 4.0, 'attn_factor': 0.5}
    config = config_of(tmp_path / 'x.gguf', extra={f'arch.rope.scaling.{k}': v for k, v in extra.items()})
    assert math.isclose(config['rope_scaling']['attention_factor'], 0.5 * (0.1 * math.log(4.0) + 1.0))


@pytest.mark.parametrize('value', [1e-6, 1e-5, 0.1, 10000.0, 500000.0, 1.0, 3.4028234663852886e38, 1e-45, 0.70710678])
def test_shortest_float32(value: float) -> None:
    single = np.float32(value)
    found = shortest_float32(float(single))
    assert np.float32(found) == single and len(repr(found)) <= len(repr(float(single)))
    assert found == value or value not in (1e-6, 1e-5, 0.1)
