"""Our logits are transformers' logits, for every architecture and the variants of its config."""

from __future__ import annotations

import pytest
import torch
from tests.models.driver import Driver, load_model
from tests.models.tiny import ARCHITECTURES, VOCAB, load_reference, make_tiny

VARIANTS = [
    ('LlamaForCausalLM', {'attention_bias': True, 'mlp_bias': True, 'rope_parameters': None}),
    ('LlamaForCausalLM', {'num_key_value_heads': 6, 'tie_word_embeddings': True, 'head_dim': None}),
    ('Qwen2ForCausalLM', {'use_sliding_window': True, 'sliding_window': 20, 'max_window_layers': 1}),
    ('Qwen3ForCausalLM', {'attention_bias': True, 'head_dim': 64, 'num_key_value_heads': 1}),
    ('MistralForCausalLM', {'sliding_window': None}),
    ('InternLM2ForCausalLM', {'num_key_value_heads': 3}),
    ('InternLM3ForCausalLM', {'mlp_bias': True, 'attention_bias': True}),
    ('Gemma3ForCausalLM', {'attention_bias': True, 'sliding_window': 300, 'num_key_value_heads': 3}),
]


@pytest.mark.parametrize(('arch', 'overrides'), [(arch, {}) for arch in ARCHITECTURES] + VARIANTS)
def test_logits_equal_transformers(arch, overrides, tmp_path):
    folder = make_tiny(arch, tmp_path / 'model', **overrides)
    ids = torch.randint(0, VOCAB, (1, 330), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = load_reference(folder)(ids).logits[0]
    found = Driver(load_model(folder)).sequence(ids[0].tolist())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
