"""Llama 2 and 3, SmolLM2, and everything else that says LlamaForCausalLM."""

from __future__ import annotations

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.spec import DecoderSpec


def spec(config: ModelConfig) -> DecoderSpec:
    return DecoderSpec(config)
