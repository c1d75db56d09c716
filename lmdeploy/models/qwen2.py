"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.spec import DecoderSpec


def spec(config: ModelConfig) -> DecoderSpec:
    return DecoderSpec(config)
