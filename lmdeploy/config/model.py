"""ModelConfig: a model's config.json (or GGUF metadata in its form) as one typed, checked value.

What a field defaults to, and which flags mean biases or windows, differs between families of models; a family is a row
of ``FAMILIES``. Nothing here needs torch, so a bad model is refused before anything heavy loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.config.fields import Fields, shown
from lmdeploy.config.quantization import Quantization, read_quantization
from lmdeploy.config.rope import MAX_POSITIONS, RopeConfig, RopeContext, read_rope
from lmdeploy.config.vision import VISION_MODELS, is_vision_model
from lmdeploy.config.vision_language import language_config
from lmdeploy.errors import ConfigError
from lmdeploy.log import get_logger

LENGTH_KEYS = ('max_position_embeddings', 'n_positions', 'max_seq_len', 'seq_length', 'model_max_length',
               'max_sequence_length', 'max_seq_length', 'seq_len')  # fmt: skip
NESTED_KEYS = ('language_config', 'llm_config', 'text_config')
DEFAULT_CONTEXT = 2048  # where a config names no length at all
ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh'}
DTYPES = ('float32', 'bfloat16', 'float16')
FULL, SLIDING = 'full_attention', 'sliding_attention'


@dataclass(frozen=True, slots=True)
class Family:
    """How the configs of one architecture are read.

    Attributes:
        qkv_bias, o_bias, mlp_bias: name of the flag that gives these linears a bias; True or False where it is fixed.
        window: which layers a sliding window concerns: ``''`` none, ``'all'``, ``'upper'`` (those from
            max_window_layers on, if use_sliding_window) or ``'pattern'`` (all but every n-th).
        activation: name of the activation field.
        defaults: values of fields that a config may leave out.
    """

    qkv_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    window: str = ''
    activation: str = 'hidden_act'
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA3 = Family(
    'attention_bias', 'attention_bias', window='pattern', activation='hidden_activation', tied=True,
    defaults={'vocab_size': 262208, 'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
              'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256, 'sliding_window': 4096,
              'max_position_embeddings': 131072, 'hidden_activation': 'gelu_pytorch_tanh', 'rms_norm_eps': 1e-6,
              'query_pre_attn_scalar': 256, 'rope_theta': 1e6, 'rope_local_base_freq': 1e4},
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    'LlamaForCausalLM': Family('attention_bias', 'attention_bias', 'mlp_bias'),
    'Qwen2ForCausalLM': Family(True, window='upper'),
    'Qwen3ForCausalLM': Family('attention_bias', 'attention_bias', window='upper', defaults={'head_dim': 128}),
    'MistralForCausalLM': Family(window='all'),
    'InternLM2ForCausalLM': Family('bias', 'bias'),
    'InternLM3ForCausalLM': Family('qkv_bias', 'bias', 'bias'),
    'Gemma3ForCausalLM': _GEMMA3,
    'Gemma3ForConditionalGeneration': _GEMMA3,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the rest of the program knows of a model's shape.

    Attributes:
        intermediate_size: channels inside of the gated MLP.
        layer_types: one of FULL and SLIDING per layer.
        sliding_window: tokens that a sliding layer sees, itself included; 0: there is no such layer.
        rope, local_rope: of full and of sliding layers.
        attention_scalar: scores are scaled by its inverse square root.
        context_len: the context length that the model's authors name.
        dtype_name: what the weights were trained or stored in, ``''`` if the config does not say.
        quantization: how linear layers are stored; None: none is quantised.
        wrapper: architecture of the vision model whose language part this is; ``''``: of none.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    context_len: int
    rms_norm_eps: float
    activation: str
    rope: RopeConfig
    local_rope: RopeConfig
    layer_types: tuple[str, ...]
    sliding_window: int
    attention_scalar: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    dtype_name: str
    quantization: Quantization | None = None
    wrapper: str = ''

    @staticmethod
    def from_dict(
        config: Mapping[str, Any], *, session_len: int | None = None, rope_scaling_factor: float = 0.0
    ) -> ModelConfig:
        """Read and check a config.

        Args:
            config: the content of config.json.
            session_len: the context length that will be served (None: the model's own); it fixes a dynamic rope.
            rope_scaling_factor: above 1: stretch an unscaled rope dynamically by this factor.

        Raises:
            ConfigError: LMD-110 to LMD-117; each names the field and its value.
        """
        top = Fields(config)
        architecture = _architecture(top)
        family = FAMILIES[architecture]
        inner, path = _language_part(config)
        fields = Fields({**family.defaults, **{k: v for k, v in inner.items() if v is not None}}, path)
        return _read(architecture, family, fields, top, session_len, rope_scaling_factor)


def context_len(config: Mapping[str, Any]) -> int:
    """The smallest of the lengths that a config names under any of the usual keys; 2048 if it names none."""
    inner, path = _language_part(config)
    fields = Fields(inner, path)
    lengths = [fields.whole(key, 1, MAX_POSITIONS) for key in LENGTH_KEYS if fields.has(key)]
    if not lengths:
        get_logger().warning('the model names no context length; assuming %d tokens', DEFAULT_CONTEXT)
    return min(lengths, default=DEFAULT_CONTEXT)


def _architecture(top: Fields) -> str:
    names = top.raw('architectures')
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError('LMD-112', field='architectures', wanted='a list with the name of an architecture')
    if is_vision_model(top.values):
        return language_config(top.values)[0]
    if names[0] not in FAMILIES:
        raise ConfigError('LMD-110', architecture=names[0][:80],
                          known=', '.join(sorted((*FAMILIES, *VISION_MODELS))))  # fmt: skip
    return names[0]


def _language_part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The object that describes the language model, and its path."""
    if is_vision_model(config):
        return language_config(config)[1:]
    for key in NESTED_KEYS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return nested, f'{key}.'
    return config, ''


def _read(architecture: str, family: Family, fields: Fields, top: Fields, session_len: int | None,
          rope_scaling_factor: float) -> ModelConfig:  # fmt: skip
    hidden = fields.whole('hidden_size', 1, 1 << 17)
    layers = fields.whole('num_hidden_layers', 1, 1024)
    heads = fields.whole('num_attention_heads', 1, 4096)
    kv_heads = fields.whole('num_key_value_heads', 1, 4096, heads)
    if heads % kv_heads:
        raise ConfigError('LMD-114', reason=f'{heads} attention heads cannot share {kv_heads} key heads evenly')
    if not fields.has('head_dim') and hidden % heads:
        raise ConfigError('LMD-114', reason=f'hidden_size {hidden} is not a multiple of {heads} attention heads')
    head_dim = fields.whole('head_dim', 2, 1024, hidden // heads)
    vocab = fields.whole('vocab_size', 1, 1 << 22)
    length = context_len(fields.values)
    positions = fields.whole('max_position_embeddings', 1, MAX_POSITIONS, length)
    theta = family.defaults.get('rope_theta', 10000.0)
    context = RopeContext(head_dim, positions, session_len or length, theta, rope_scaling_factor)
    types, window = _windows(family, fields, layers)
    bos = fields.token_ids('bos_token_id', vocab)
    pad = fields.token_ids('pad_token_id', vocab)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.whole('intermediate_size', 1, 1 << 20),
        vocab_size=vocab,
        max_position_embeddings=positions,
        context_len=length,
        rms_norm_eps=fields.number('rms_norm_eps', 0.0, 1.0, 1e-6),
        activation=_activation(family, fields),
        rope=read_rope(fields, FULL, context),
        local_rope=read_rope(fields, SLIDING, context),
        layer_types=types,
        sliding_window=window,
        attention_scalar=_attention_scalar(family, fields, head_dim),
        tie_word_embeddings=_tied(family, fields, top),
        qkv_bias=_flag(family.qkv_bias, fields),
        o_bias=_flag(family.o_bias, fields),
        mlp_bias=_flag(family.mlp_bias, fields),
        eos_token_ids=fields.token_ids('eos_token_id', vocab) or top.token_ids('eos_token_id', vocab),
        bos_token_id=bos[0] if bos else None,
        pad_token_id=pad[0] if pad else None,
        dtype_name=_dtype_name(fields, top),
        quantization=read_quantization(top.values),
        wrapper=top.raw('architectures')[0] if is_vision_model(top.values) else '',
    )


def _flag(rule: str | bool, fields: Fields) -> bool:
    return rule if isinstance(rule, bool) else fields.flag(rule, False)


def _tied(family: Family, fields: Fields, top: Fields) -> bool:
    source = fields if fields.has('tie_word_embeddings') else top
    return source.flag('tie_word_embeddings', family.tied)


def _activation(family: Family, fields: Fields) -> str:
    name = fields.text(family.activation, 'silu')
    if name not in ACTIVATIONS:
        field_ = fields.path + family.activation
        raise ConfigError('LMD-115', field=field_, value=shown(name), known=', '.join(ACTIVATIONS))
    return ACTIVATIONS[name]


def _attention_scalar(family: Family, fields: Fields, head_dim: int) -> float:
    for name in ('attn_logit_softcapping', 'final_logit_softcapping'):
        if fields.has(name):
            raise ConfigError('LMD-115', field=fields.path + name, value=shown(fields.raw(name)), known='null')
    if 'query_pre_attn_scalar' not in family.defaults:
        return float(head_dim)
    return fields.number('query_pre_attn_scalar', 0.0, 1e6)


def _windows(family: Family, fields: Fields, layers: int) -> tuple[tuple[str, ...], int]:
    """Which layers slide, and over how many tokens."""
    full = (FULL,) * layers
    if not family.window or (family.window == 'upper' and not fields.flag('use_sliding_window', False)):
        return full, 0
    window = fields.whole('sliding_window', 1, MAX_POSITIONS, 0)
    if not window:
        return full, 0
    if family.window == 'all':
        return (SLIDING,) * layers, window
    if fields.has('layer_types'):
        types = fields.raw('layer_types')
        if not isinstance(types, list) or len(types) != layers:
            raise fields.bad('layer_types', f'a list of {layers} layer types')
        unknown = [t for t in types if t not in (FULL, SLIDING)]
        if unknown:
            raise ConfigError('LMD-115', field=f'{fields.path}layer_types', value=shown(unknown[0]),
                              known=f'{FULL}, {SLIDING}')  # fmt: skip
    elif family.window == 'upper':
        first = fields.whole('max_window_layers', 0, 1024, layers)
        types = [SLIDING if i >= first else FULL for i in range(layers)]
    else:
        every = fields.whole('sliding_window_pattern', 1, 1024, fields.whole('_sliding_window_pattern', 1, 1024, 6))
        types = [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    return tuple(types), window if SLIDING in types else 0


def _dtype_name(fields: Fields, top: Fields) -> str:
    for source in (fields, top):
        for key in ('dtype', 'torch_dtype'):
            name = source.text(key, '').removeprefix('torch.')
            if name and name not in DTYPES:
                raise ConfigError('LMD-115', field=source.path + key, value=shown(name), known=', '.join(DTYPES))
            if name:
                return name
    return ''
