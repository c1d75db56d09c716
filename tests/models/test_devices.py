"""The same model on another device: without kernels of its own, the references run there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.models.driver import Driver, load_model

CONFIG = {
    'architectures': ['Gemma3ForCausalLM'], 'vocab_size': 100, 'hidden_size': 64, 'intermediate_size': 96,
    'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 32, 'sliding_window': 20,
    'layer_types': ['sliding_attention', 'full_attention'], 'query_pre_attn_scalar': 32, 'eos_token_id': 1,
}  # fmt: skip


def write(folder) -> None:
    """A Gemma 3 of random weights: it uses every part of the decoder."""
    torch.manual_seed(0)
    shapes = {'self_attn.q_proj': (128, 64), 'self_attn.k_proj': (64, 64), 'self_attn.v_proj': (64, 64),
              'self_attn.o_proj': (64, 128), 'mlp.gate_proj': (96, 64), 'mlp.up_proj': (96, 64),
              'mlp.down_proj': (64, 96)}  # fmt: skip
    norms = {'input_layernorm': 64, 'post_attention_layernorm': 64, 'pre_feedforward_layernorm': 64,
             'post_feedforward_layernorm': 64, 'self_attn.q_norm': 32, 'self_attn.k_norm': 32}  # fmt: skip
    tensors = {'model.embed_tokens.weight': torch.randn(100, 64), 'model.norm.weight': torch.randn(64) * 0.1}
    for i in range(2):
        for name, shape in shapes.items():
            tensors[f'model.layers.{i}.{name}.weight'] = torch.randn(shape) / shape[1] ** 0.5
        for name, size in norms.items():
            tensors[f'model.layers.{i}.{name}.weight'] = torch.randn(size) * 0.1
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    save_file(tensors, folder / 'model.safetensors')


@pytest.mark.gpu
@pytest.mark.parametrize(('dtype', 'error'), [(torch.float32, 1e-3), (torch.bfloat16, 0.2), (torch.float16, 0.05)])
def test_gpu_equals_cpu(tmp_path, dtype, error):
    write(tmp_path)
    ids = torch.randint(0, 100, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = Driver(load_model(tmp_path)).sequence(ids)
    driver = Driver(load_model(tmp_path, dtype, device='cuda'), dtype=dtype)
    found = driver.sequence(ids, 37)
    assert found.device.type == 'cuda'
    assert (found.cpu() - wanted).abs().max() < error * wanted.abs().max()
