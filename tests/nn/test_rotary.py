"""Every rope type turns by the angles that transformers turns by."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lmdeploy.config.model import ModelConfig
from lmdeploy.config.rope import RopeConfig
from lmdeploy.nn.rotary import Rotary, dynamic_theta, inverse_frequencies

BASE = {'architectures': ['LlamaForCausalLM'], 'hidden_size': 256, 'intermediate_size': 8, 'num_hidden_layers': 1,
        'num_attention_heads': 4, 'vocab_size': 10, 'max_position_embeddings': 1024}  # fmt: skip
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 256}
TYPES = {
    'default': {'rope_type': 'default'},
    'linear': {'rope_type': 'linear', 'factor': 4.0},
    'dynamic': {'rope_type': 'dynamic', 'factor': 6.0},
    'llama3': {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
               'original_max_position_embeddings': 256},
    'yarn': YARN,
    'yarn with factors': YARN | {'attention_factor': 1.3, 'beta_fast': 16, 'beta_slow': 2},
    'yarn with scales': YARN | {'mscale': 0.7, 'mscale_all_dim': 1.2},
    'yarn untruncated': YARN | {'truncate': False},
}  # fmt: skip


@pytest.mark.parametrize('theta', [10000.0, 1e6])
@pytest.mark.parametrize('name', TYPES)
def test_angles_equal_transformers(name, theta):
    scaling = TYPES[name]
    config = ModelConfig.from_dict(BASE | {'rope_theta': theta, 'rope_scaling': scaling})
    ours = Rotary(config.rope, torch.device('cpu'))
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=1024,
        rope_parameters=scaling | {'rope_theta': theta}))  # fmt: skip
    positions = torch.tensor([0, 1, 2, 17, 255, 256, 700, 1023], dtype=torch.int32)
    cos, sin = ours(positions)
    wanted_cos, wanted_sin = theirs(torch.zeros(1), positions[None].long())
    torch.testing.assert_close(cos[:, 0], wanted_cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[:, 0, 32:], wanted_sin[0, :, 32:], atol=1e-6, rtol=0)
    assert torch.equal(sin[:, 0, :32], -sin[:, 0, 32:])


def test_dynamic_base_beyond_the_window_is_that_of_the_served_length():
    inside = RopeConfig('dynamic', 10000.0, 64, 6.0, 1024, 1000)
    assert dynamic_theta(inside) == 10000.0
    long = RopeConfig('dynamic', 10000.0, 64, 6.0, 1024, 4096)
    assert dynamic_theta(long) == pytest.approx(10000.0 * (6.0 * 4 - 5.0) ** (64 / 62))
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=1024,
        rope_parameters=TYPES['dynamic'] | {'rope_theta': 10000.0}))  # fmt: skip
    theirs(torch.zeros(1), torch.arange(4096)[None])  # transformers raises the base when it meets a length
    torch.testing.assert_close(inverse_frequencies(long)[0], theirs.inv_freq, rtol=1e-5, atol=0)


def test_frequency_factors_divide():
    config = ModelConfig.from_dict(BASE | {'rope_scaling': {'rope_type': 'frequency_factors', 'factors': [2.0] * 32}})
    plain = inverse_frequencies(RopeConfig('default', 10000.0, 64))[0]
    assert torch.equal(inverse_frequencies(config.rope)[0], plain / 2)


def test_part_of_the_channels_turns():
    config = ModelConfig.from_dict(BASE | {'partial_rotary_factor': 0.25})
    cos, _ = Rotary(config.rope, torch.device('cpu'))(torch.arange(3))
    assert cos.shape == (3, 1, 16)


def test_a_position_gives_the_same_bits_anywhere():
    rotary = Rotary(RopeConfig('default', 1e6, 64), torch.device('cpu'))
    positions = torch.arange(3000)
    whole = rotary(positions)
    for a, b in ((0, 1), (5, 12), (2999, 3000), (7, 1000)):
        assert all(torch.equal(part, all_[a:b]) for part, all_ in zip(rotary(positions[a:b]), whole))
