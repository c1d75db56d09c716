"""InternLM2 and 2.5: Llama's computation under other names, with q, k and v packed per key head."""

from __future__ import annotations

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.spec import DecoderSpec, Names

NAMES = Names(
    embedding='tok_embeddings',
    heads=('output',),
    attention='attention',
    packed_qkv='wqkv',
    o='wo',
    mlp='feed_forward',
    gate_up=('w1', 'w3'),
    down='w2',
    attention_norm='attention_norm',
    mlp_norm='ffn_norm',
)


def spec(config: ModelConfig) -> DecoderSpec:
    return DecoderSpec(config, NAMES)
