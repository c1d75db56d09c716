"""The language part of a vision model's config.json, in the form of a language model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.config.fields import Fields
from lmdeploy.config.vision import INTERNVL, QWEN2_5_VL, QWEN2_VL
from lmdeploy.errors import ConfigError

# what a nested text_config leaves out: the defaults of its model_type
_LLAMA = {'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
          'num_attention_heads': 32, 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6}  # fmt: skip
_QWEN2 = {'vocab_size': 151936, 'hidden_size': 4096, 'intermediate_size': 22016, 'num_hidden_layers': 32,
          'num_attention_heads': 32, 'num_key_value_heads': 32, 'max_position_embeddings': 32768, 'rms_norm_eps': 1e-6}
LANGUAGE_MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    'llama': ('LlamaForCausalLM', _LLAMA),
    'mistral': ('MistralForCausalLM', {**_LLAMA, 'intermediate_size': 14336, 'num_key_value_heads': 8,
                                       'max_position_embeddings': 131072, 'sliding_window': 4096}),
    'qwen2': ('Qwen2ForCausalLM', _QWEN2),
    'qwen3': ('Qwen3ForCausalLM', {**_QWEN2, 'head_dim': 128}),
    'internlm2': ('InternLM2ForCausalLM', {}),
    'internlm3': ('InternLM3ForCausalLM', {}),
}
"""model_type of a language part -> its architecture and what such a part may leave out."""


def language_config(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str]:
    """The language part of a vision model's config.json: its architecture, its fields, and where they lie.

    Raises:
        ConfigError: LMD-110, LMD-112: it is of no kind that runs here, or missing.
    """
    if config['architectures'][0] in (QWEN2_VL, QWEN2_5_VL):
        nested = config.get('text_config')
        inner, path = (nested, 'text_config.') if isinstance(nested, Mapping) else (config, '')
        kind = 'qwen2'
    else:
        name = 'llm_config' if config['architectures'][0] == INTERNVL else 'text_config'
        found = Fields(config).object(name)
        if found is None:
            raise ConfigError('LMD-112', field=name, wanted='an object of named fields')
        inner, path, kind = found.values, found.path, found.text('model_type', 'llama')
        names = found.raw('architectures')
        if isinstance(names, list) and names:
            kind = next((key for key, (known, _) in LANGUAGE_MODELS.items() if known == names[0]), str(names[0]))
    if kind not in LANGUAGE_MODELS:
        raise ConfigError('LMD-110', architecture=f"{config['architectures'][0]} ({kind[:80]})",
                          known=', '.join(LANGUAGE_MODELS))
    architecture, defaults = LANGUAGE_MODELS[kind]
    return architecture, {**defaults, **inner}, path
