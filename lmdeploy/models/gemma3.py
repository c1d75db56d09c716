"""Gemma 3: two kinds of layers with a rope each, norms on both sides of each half, and scaled embeddings.

The vision-language model's text part is the same decoder under a prefix; its vision tower is not loaded.
"""

from __future__ import annotations

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.spec import DecoderSpec, Names

NAMES = Names(
    roots=('language_model.model', 'model.language_model', 'model'),
    heads=('lm_head', 'language_model.lm_head'),
    attention_post_norm='post_attention_layernorm',
    mlp_norm='pre_feedforward_layernorm',
    mlp_post_norm='post_feedforward_layernorm',
    ignore=(*Names().ignore, r'(^|\.)vision_tower\.', r'(^|\.)multi_modal_projector\.'),
)


def spec(config: ModelConfig) -> DecoderSpec:
    return DecoderSpec(
        config,
        NAMES,
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        embedding_scale=config.hidden_size**0.5,
    )
