"""From the name of an architecture to its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from lmdeploy.config.model import ModelConfig
from lmdeploy.errors import ConfigError
from lmdeploy.kv.cache import KVCache, KVShape
from lmdeploy.models import gemma3, internlm2, internlm3, llama, mistral, qwen2, qwen3
from lmdeploy.models.decoder import Decoder
from lmdeploy.models.spec import DecoderSpec
from lmdeploy.models.vision.language import inside
from lmdeploy.nn.build import Build
from lmdeploy.quant.kernels.cpu import keeps_blocks
from lmdeploy.quant.policy import QuantPolicy
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.weights.checkpoint import Prefix


class CausalLM(Protocol):
    """What the runner knows of a model."""

    spec: DecoderSpec
    config: ModelConfig
    build: Build
    kv_shape: KVShape

    @property
    def ignore(self) -> tuple[str, ...]: ...

    @property
    def static(self) -> bool: ...

    def load(self, prefix: Prefix) -> None: ...

    def prepare(self, batch: ForwardBatch, kv: KVCache) -> None: ...

    def __call__(self, batch: ForwardBatch, kv: KVCache) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def choices(self) -> dict[str, str]: ...


SPECS: dict[str, Callable[[ModelConfig], DecoderSpec]] = {
    'LlamaForCausalLM': llama.spec,
    'Qwen2ForCausalLM': qwen2.spec,
    'Qwen3ForCausalLM': qwen3.spec,
    'MistralForCausalLM': mistral.spec,
    'InternLM2ForCausalLM': internlm2.spec,
    'InternLM3ForCausalLM': internlm3.spec,
    'Gemma3ForCausalLM': gemma3.spec,
    'Gemma3ForConditionalGeneration': gemma3.spec,
}


def decoder_spec(config: ModelConfig) -> DecoderSpec:
    """The description of ``config``'s decoder.

    Raises:
        ConfigError: LMD-110: no such architecture; lists those there are.
    """
    spec = SPECS.get(config.architecture)
    if spec is None:
        raise ConfigError('LMD-110', architecture=config.architecture, known=', '.join(sorted(SPECS)))
    return inside(spec(config), config.wrapper) if config.wrapper else spec(config)


def build_model(config: ModelConfig, build: Build) -> CausalLM:
    """The model of ``config``, without weights, whose layers are stored as ``config`` says.

    Raises:
        ConfigError: as :func:`decoder_spec`.
    """
    blocks = not build.exact and keeps_blocks(build.device, build.dtype)
    return Decoder(decoder_spec(config), replace(build, policy=QuantPolicy(config.quantization, blocks)))
