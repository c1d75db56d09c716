"""Qwen3: Llama with queries and keys normalised per head."""

from __future__ import annotations

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.spec import DecoderSpec


def spec(config: ModelConfig) -> DecoderSpec:
    return DecoderSpec(config, qk_norm=True)
