"""InternLM3: Llama's tensors, with flags of its own for biases and a dynamic rope."""

from __future__ import annotations

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.spec import DecoderSpec


def spec(config: ModelConfig) -> DecoderSpec:
    return DecoderSpec(config)
