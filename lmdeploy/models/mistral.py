"""Mistral: Llama, with a sliding window on all layers where the config sets one."""

from __future__ import annotations

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.spec import DecoderSpec


def spec(config: ModelConfig) -> DecoderSpec:
    return DecoderSpec(config)
