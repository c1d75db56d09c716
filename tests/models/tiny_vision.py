"""Tiny random vision models of every family, written by transformers as Hugging Face folders.

The original InternVL repositories are what transformers' InternVL has, under their own names and layout; the twin lies
beside them for ``load_vision_reference``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.tiny import _randomise

IMAGE_TOKEN = 150
TEXT: dict[str, Any] = {
    'model_type': 'qwen2', 'vocab_size': 160, 'hidden_size': 48, 'intermediate_size': 80, 'num_hidden_layers': 2,
    'num_attention_heads': 6, 'num_key_value_heads': 2, 'max_position_embeddings': 1024, 'rms_norm_eps': 1e-5,
    'tie_word_embeddings': False, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0,
}  # fmt: skip
LLAMA, MISTRAL = ({**TEXT, 'model_type': kind} for kind in ('llama', 'mistral'))
SQUARE: dict[str, Any] = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'intermediate_size': 56,
                          'image_size': 56, 'patch_size': 14}  # fmt: skip
INTERN = {**SQUARE, 'attention_bias': True, 'image_size': [56, 56], 'patch_size': [14, 14]}
LARGE_INTERN = {**INTERN, 'attention_bias': False, 'use_qk_norm': True, 'norm_type': 'rms_norm'}
CLIP = {**SQUARE, 'model_type': 'clip_vision_model', 'projection_dim': 16}
SIGLIP = {**SQUARE, 'model_type': 'siglip_vision_model', 'image_size': 60}
QWEN_TEXT = {**TEXT, 'num_attention_heads': 3, 'num_key_value_heads': 1, 'rope_parameters': {
    'rope_type': 'default', 'rope_theta': 10000.0, 'mrope_section': [2, 3, 3]}}  # fmt: skip
QWEN2: dict[str, Any] = {'depth': 2, 'embed_dim': 32, 'num_heads': 2, 'mlp_ratio': 2, 'hidden_size': 48}
QWEN2_5: dict[str, Any] = {'depth': 3, 'hidden_size': 32, 'num_heads': 2, 'intermediate_size': 56, 'window_size': 56,
                           'out_hidden_size': 48, 'fullatt_block_indexes': [1]}  # fmt: skip
NEXT = {'image_grid_pinpoints': [[56, 112], [112, 56], [112, 112], [168, 56]]}


def _config(kind: str, text: dict[str, Any], vision: dict[str, Any], **top: Any) -> tuple[str, dict[str, Any]]:
    if kind not in ('Qwen2VL', 'Qwen2_5_VL'):
        top = {'image_token_id' if kind == 'InternVL' else 'image_token_index': IMAGE_TOKEN, **top}
    else:
        top = {'image_token_id': IMAGE_TOKEN, 'video_token_id': 151, 'vision_start_token_id': 152,
               'vision_end_token_id': 153, **top}  # fmt: skip
    text = {key: value for key, value in text.items() if key != 'model_type' or not kind.startswith('Qwen')}
    return kind, {'text_config': text, 'vision_config': vision, 'tie_word_embeddings': False, **top}


# name -> (transformers' class prefix, its config); an original repository's says how its code merges pixels
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    'internvl': _config('InternVL', TEXT, INTERN),
    'internvl-6b': _config('InternVL', LLAMA, LARGE_INTERN),
    'internvl-chat': _config('InternVL', TEXT, INTERN),
    'internvl-chat-6b': _config('InternVL', LLAMA, LARGE_INTERN),
    'llava': _config('Llava', LLAMA, CLIP),
    'llava-full': _config('Llava', LLAMA, CLIP, vision_feature_select_strategy='full', vision_feature_layer=-1,
                          multimodal_projector_bias=False),  # fmt: skip
    'llava-siglip': _config('Llava', TEXT, SIGLIP, vision_feature_select_strategy='full', vision_feature_layer=2),
    'llava-next': _config('LlavaNext', MISTRAL, CLIP, **NEXT),
    'qwen2-vl': _config('Qwen2VL', QWEN_TEXT, QWEN2),
    'qwen2.5-vl': _config('Qwen2_5_VL', QWEN_TEXT, QWEN2_5),
}  # fmt: skip
TWIN = 'twin'


def make_vision(name: str, folder: Path) -> Path:
    """Write a tiny random model into ``folder`` and return it; its weights depend on the name alone."""
    kind, values = FAMILIES[name]
    original = name.startswith('internvl-chat')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f'{kind}Config')(**values)
        model = getattr(transformers, f'{kind}ForConditionalGeneration')(config).eval()
        _randomise(model)
    model.save_pretrained(folder / TWIN if original else folder)
    preprocessor: dict[str, Any] = {}
    if kind.startswith('Llava'):
        size = values['vision_config']['image_size']
        square = {'height': size, 'width': size}
        preprocessor = {'size': square if name == 'llava-siglip' else {'shortest_edge': size}, 'crop_size': square}
    elif kind.startswith('Qwen'):
        preprocessor = {'min_pixels': 56 * 56, 'max_pixels': 28 * 28 * 40}
    if original:
        _relay_internvl(folder)
    else:
        (folder / 'preprocessor_config.json').write_text(json.dumps(preprocessor))
    return folder


def load_vision_reference(folder: Path) -> Any:
    """transformers' model of the folder, in float32, with plain attention."""
    twin = folder / TWIN
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        twin if twin.exists() else folder, dtype=torch.float32, attn_implementation='eager')
    return loaded.eval()


def _relay_internvl(folder: Path) -> None:
    twin = json.loads((folder / TWIN / 'config.json').read_text())
    vision, text = twin['vision_config'], twin['text_config']
    text['architectures'] = ['Qwen2ForCausalLM' if text['model_type'] == 'qwen2' else 'LlamaForCausalLM']
    config = {
        'architectures': ['InternVLChatModel'], 'model_type': 'internvl_chat', 'llm_config': text,
        'downsample_ratio': 0.5, 'dynamic_image_size': True, 'force_image_size': 56, 'max_dynamic_patch': 12,
        'min_dynamic_patch': 1, 'ps_version': 'v2', 'select_layer': -1, 'use_thumbnail': True, 'pad2square': False,
        'vision_config': {
            'architectures': ['InternVisionModel'], 'model_type': 'intern_vit_6b', 'image_size': 56, 'patch_size': 14,
            'qkv_bias': vision['attention_bias'], 'qk_normalization': vision['use_qk_norm'],
            **{key: vision[key] for key in ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'hidden_act',
                                            'intermediate_size', 'layer_norm_eps', 'norm_type')}},
    }  # fmt: skip
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
    tensors = load_file(folder / TWIN / 'model.safetensors')
    save_file({name: tensor.contiguous() for name, tensor in _renamed(tensors).items()},
              folder / 'model.safetensors', metadata={'format': 'pt'})


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names and layout to the original ones."""
    renames = {
        'vision_tower.': 'vision_model.', 'multi_modal_projector.layer_norm': 'mlp1.0',
        'multi_modal_projector.linear_1': 'mlp1.1', 'multi_modal_projector.linear_2': 'mlp1.3',
        'patch_embeddings.projection': 'patch_embedding', 'cls_token': 'class_embedding',
        'position_embeddings': 'position_embedding', 'encoder.layer.': 'encoder.layers.',
        'attention.projection_layer': 'attn.proj', 'attention.q_norm': 'attn.q_norm', 'attention.k_norm': 'attn.k_norm',
        'layernorm_before': 'norm1', 'layernorm_after': 'norm2', 'lambda_1': 'ls1', 'lambda_2': 'ls2',
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        if 'attention.q_proj' in name:
            parts = [tensors[name.replace('q_proj', part)] for part in ('q_proj', 'k_proj', 'v_proj')]
            name, tensor = name.replace('attention.q_proj', 'attn.qkv'), torch.cat(parts)
        elif 'attention.k_proj' in name or 'attention.v_proj' in name:
            continue
        for old, new in renames.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found
