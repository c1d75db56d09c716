"""Tiny random models of every architecture, written by transformers as Hugging Face folders.

``make_tiny('Qwen2ForCausalLM', folder)`` gives a folder that our engine and transformers both load. transformers has no
InternLM2 and InternLM3: those are its Llama with the same weights under their own names and layout, and the Llama twin
lies beside them for ``load_reference``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 160
SIZES: dict[str, Any] = {
    'vocab_size': VOCAB, 'hidden_size': 48, 'intermediate_size': 80, 'num_hidden_layers': 2, 'num_attention_heads': 6,
    'num_key_value_heads': 2, 'head_dim': 16, 'max_position_embeddings': 512, 'rms_norm_eps': 1e-5,
    'tie_word_embeddings': False, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0,
}  # fmt: skip
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 10000.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 64}  # fmt: skip
DYNAMIC = {'rope_type': 'dynamic', 'rope_theta': 10000.0, 'factor': 6.0}
GEMMA_ROPES = {'sliding_attention': {'rope_type': 'default', 'rope_theta': 1000.0},
               'full_attention': {'rope_type': 'linear', 'rope_theta': 50000.0, 'factor': 4.0}}  # fmt: skip

# architecture -> (transformers' config class, its model class, what differs from SIZES)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    'LlamaForCausalLM': ('LlamaConfig', 'LlamaForCausalLM', {'rope_parameters': LLAMA3}),
    'Qwen2ForCausalLM': ('Qwen2Config', 'Qwen2ForCausalLM', {'tie_word_embeddings': True, 'head_dim': None}),
    'Qwen3ForCausalLM': ('Qwen3Config', 'Qwen3ForCausalLM', {}),
    'MistralForCausalLM': ('MistralConfig', 'MistralForCausalLM', {'sliding_window': 24}),
    'InternLM2ForCausalLM': ('LlamaConfig', 'LlamaForCausalLM', {}),
    'InternLM3ForCausalLM': ('LlamaConfig', 'LlamaForCausalLM', {'rope_parameters': DYNAMIC}),
    'Gemma3ForCausalLM': ('Gemma3TextConfig', 'Gemma3ForCausalLM', {
        'tie_word_embeddings': True, 'sliding_window': 24, 'query_pre_attn_scalar': 20,
        'layer_types': ['sliding_attention', 'full_attention'], 'rope_parameters': GEMMA_ROPES}),
}  # fmt: skip
TWIN = 'llama'  # the folder of the Llama twin


def make_tiny(arch: str, folder: Path, **overrides: Any) -> Path:
    """Write a tiny random model of ``arch`` into ``folder`` and return it; fields of its config can be overridden.

    A folder that exists is returned as it is. The weights depend on the arguments alone.
    """
    folder = Path(folder)
    if (folder / 'config.json').exists():
        return folder
    config_class, model_class, differs = ARCHITECTURES[arch]
    values = {k: v for k, v in (SIZES | differs | overrides).items() if v is not None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values)).eval()
        _randomise(model)
    relay = {'InternLM2ForCausalLM': _relay_internlm2, 'InternLM3ForCausalLM': _relay_internlm3}.get(arch)
    model.save_pretrained(folder if relay is None else folder / TWIN)
    if relay is not None:
        relay(folder, values)
    return folder


def load_reference(folder: Path) -> Any:
    """transformers' model of the folder, in float32, with plain attention."""
    twin = Path(folder) / TWIN
    path = twin if twin.exists() else folder
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation='eager')
    return loaded.eval()


def _randomise(model: torch.nn.Module) -> None:
    """Weights of a size that keeps activations near 1, and norms and biases that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            elif 'embed' in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))


def _relay_internlm2(folder: Path, values: dict[str, Any]) -> None:
    tensors = load_file(folder / TWIN / 'model.safetensors')
    renames = {'self_attn.o_proj': 'attention.wo', 'mlp.gate_proj': 'feed_forward.w1', 'mlp.up_proj': 'feed_forward.w3',
               'mlp.down_proj': 'feed_forward.w2', 'input_layernorm': 'attention_norm',
               'post_attention_layernorm': 'ffn_norm', 'model.embed_tokens': 'model.tok_embeddings',
               'lm_head': 'output'}  # fmt: skip
    kv_heads, dim = values['num_key_value_heads'], values['head_dim']
    relaid = {}
    for name, tensor in tensors.items():
        if '.q_proj.' in name:
            q, k, v = (tensors[name.replace('q_proj', part)] for part in ('q_proj', 'k_proj', 'v_proj'))
            parts = [t.view(kv_heads, -1, dim, *t.shape[1:]) for t in (q, k, v)]
            packed = torch.cat(parts, 1).reshape(-1, *q.shape[1:])
            relaid[name.replace('self_attn.q_proj', 'attention.wqkv')] = packed.contiguous()
        elif '.k_proj.' not in name and '.v_proj.' not in name:
            for old, new in renames.items():
                name = name.replace(old, new)
            relaid[name] = tensor
    flags = {'bias': bool(values.get('attention_bias', False))}
    _write(folder, relaid, 'InternLM2ForCausalLM', 'internlm2', flags)


def _relay_internlm3(folder: Path, values: dict[str, Any]) -> None:
    flags = {'qkv_bias': bool(values.get('attention_bias', False)), 'bias': bool(values.get('mlp_bias', False))}
    tensors = load_file(folder / TWIN / 'model.safetensors')
    _write(folder, tensors, 'InternLM3ForCausalLM', 'internlm3', flags)


def _write(folder: Path, tensors: dict[str, torch.Tensor], arch: str, model_type: str, flags: dict[str, bool]) -> None:
    config = json.loads((folder / TWIN / 'config.json').read_text())
    rope = config.pop('rope_parameters')
    config['rope_theta'] = rope.pop('rope_theta')
    if rope['rope_type'] != 'default':  # the spelling that these models' own configs have
        config['rope_scaling'] = {('type' if key == 'rope_type' else key): value for key, value in rope.items()}
    for flag in ('attention_bias', 'mlp_bias'):
        config.pop(flag, None)
    config.update(architectures=[arch], model_type=model_type, **flags)
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
