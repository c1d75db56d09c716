"""Configs of vision models as their authors publish them, in the sizes that tests need."""

from __future__ import annotations

from typing import Any

from lmdeploy.config.vision import VisionModelConfig, read_vision

TEXT = {'model_type': 'qwen2', 'hidden_size': 64}
TOWER = {'hidden_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 64}


def internvl(size: int = 448, **top: Any) -> VisionModelConfig:
    """An original repository's."""
    values = {'downsample_ratio': 0.5, 'dynamic_image_size': True, 'force_image_size': size, 'min_dynamic_patch': 1,
              'max_dynamic_patch': 12, 'use_thumbnail': True, 'ps_version': 'v2', 'select_layer': -1}  # fmt: skip
    return read_vision({'architectures': ['InternVLChatModel'], 'llm_config': TEXT, 'vision_config': {
        **TOWER, 'image_size': size, 'patch_size': 14, 'norm_type': 'layer_norm'}, **values, **top})


def internvl_hf(size: int = 448, **pictures: Any) -> VisionModelConfig:
    return read_vision({'architectures': ['InternVLForConditionalGeneration'], 'text_config': TEXT,
                        'image_token_id': 7, 'vision_config': {
                            **TOWER, 'image_size': [size, size], 'patch_size': [14, 14]}}, pictures)  # fmt: skip


def llava(architecture: str = 'LlavaForConditionalGeneration', model_type: str = 'clip_vision_model', size: int = 336,
          pictures: dict[str, Any] | None = None, **top: Any) -> VisionModelConfig:
    config = {'architectures': [architecture], 'text_config': TEXT, 'image_token_index': 32000, 'vision_config': {
        **TOWER, 'model_type': model_type, 'image_size': size, 'patch_size': 14}, **top}  # fmt: skip
    return read_vision(config, pictures)


def qwen(architecture: str = 'Qwen2VLForConditionalGeneration', **pictures: Any) -> VisionModelConfig:
    vision = {'depth': 1, 'embed_dim': 32, 'num_heads': 2, 'mlp_ratio': 2, 'hidden_size': 64}
    if architecture.startswith('Qwen2_5'):
        vision = {'depth': 1, 'hidden_size': 32, 'num_heads': 2, 'intermediate_size': 64, 'out_hidden_size': 64,
                  'fullatt_block_indexes': [0]}  # fmt: skip
    config = {'architectures': [architecture], 'image_token_id': 9, 'vision_config': vision, **TEXT}
    return read_vision(config, pictures)
