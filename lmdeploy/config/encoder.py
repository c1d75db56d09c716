"""EncoderConfig: the config.json of a text encoder (BERT and its kin), and how its hidden states become one vector.

An encoder writes nothing: it reads a whole text at once, each token in sight of all others; what it gives is pooled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmdeploy.config.fields import Fields, shown
from lmdeploy.config.rope import MAX_POSITIONS
from lmdeploy.errors import ConfigError

BERT = ('BertModel', 'BertForMaskedLM')
ROBERTA = ('RobertaModel', 'RobertaForMaskedLM', 'XLMRobertaModel', 'XLMRobertaForMaskedLM')
ENCODERS = (*BERT, *ROBERTA)
ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu'}
DTYPES = ('float32', 'bfloat16', 'float16')
MODES: dict[str, Literal['mean', 'cls', 'max']] = {
    'pooling_mode_mean_tokens': 'mean', 'pooling_mode_cls_token': 'cls', 'pooling_mode_max_tokens': 'max'}


@dataclass(frozen=True, slots=True)
class Pooling:
    """From the hidden states of a text to its vector.

    Attributes:
        mode: the mean of all tokens, the first token's, or the largest value of each channel.
        normalise: give it length 1.
        max_tokens: what the model's authors cut texts to; 0: they do not say.
    """

    mode: Literal['mean', 'cls', 'max'] = 'mean'
    normalise: bool = True
    max_tokens: int = 0

    @staticmethod
    def from_modules(modules: list[dict[str, Any]], pooling: Mapping[str, Any],
                     transformer: Mapping[str, Any]) -> Pooling:
        """What the files of the sentence-transformers library say.

        Args:
            modules: modules.json; empty: the mean, at length 1.
            pooling: the config.json of its Pooling module.
            transformer: sentence_bert_config.json.

        Raises:
            ConfigError: LMD-115: a module or a way of pooling that is not here.
        """
        most = Fields(transformer).whole('max_seq_length', 1, MAX_POSITIONS, 0)
        kinds = [str(module.get('type', '')).rsplit('.', 1)[-1] for module in modules]
        for kind in kinds:
            if kind not in ('Transformer', 'Pooling', 'Normalize'):
                raise ConfigError('LMD-115', field='modules.json: type', value=shown(kind),
                                  known='Transformer, Pooling, Normalize')
        if 'Pooling' not in kinds:
            return Pooling(max_tokens=most)
        fields = Fields(pooling)
        chosen = [name for name in pooling if name.startswith('pooling_mode_') and fields.flag(name, False)]
        if len(chosen) != 1 or chosen[0] not in MODES:
            raise ConfigError('LMD-115', field='pooling', value=shown(', '.join(chosen)), known=', '.join(MODES))
        return Pooling(MODES[chosen[0]], 'Normalize' in kinds, most)


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The shape of an encoder.

    Attributes:
        positions: rows of the table of positions.
        first_position: of a text's first token; the rows before it are never used.
        token_types: rows of the table of token types, of which a text uses the first; 0: there is none.
        dtype_name: what the weights were stored in, ``''`` if the config does not say.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    positions: int
    first_position: int
    token_types: int
    norm_eps: float
    activation: str
    dtype_name: str

    @property
    def context_len(self) -> int:
        """The most tokens of a text, those that the tokenizer puts around it included."""
        return self.positions - self.first_position

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> EncoderConfig:
        """Read and check a config.

        Raises:
            ConfigError: LMD-110, LMD-112 to LMD-115; each names the field and its value.
        """
        fields = Fields(config)
        architecture = _architecture(config)
        if architecture not in ENCODERS:
            raise ConfigError('LMD-110', architecture=architecture[:80], known=', '.join(ENCODERS))
        hidden = fields.whole('hidden_size', 1, 1 << 16)
        heads = fields.whole('num_attention_heads', 1, 1024)
        if hidden % heads:
            raise ConfigError('LMD-114', reason=f'hidden_size {hidden} is not a multiple of {heads} attention heads')
        positions = fields.whole('max_position_embeddings', 1, MAX_POSITIONS)
        first = fields.whole('pad_token_id', 0, 1 << 22, 1) + 1 if architecture in ROBERTA else 0
        if first >= positions:
            raise ConfigError('LMD-114', reason=f'{positions} positions leave none after the first {first}')
        activation = fields.text('hidden_act', 'gelu')
        kind = fields.text('position_embedding_type', 'absolute')
        dtype = fields.text('dtype', fields.text('torch_dtype', ''))
        decoder = 'true' if fields.flag('is_decoder', False) else 'false'
        for name, value, known in (('hidden_act', activation, tuple(ACTIVATIONS)), ('is_decoder', decoder, ('false',)),
                                   ('position_embedding_type', kind, ('absolute',)), ('dtype', dtype, ('', *DTYPES))):
            if value not in known:
                raise ConfigError('LMD-115', field=name, value=shown(value), known=', '.join(filter(None, known)))
        return EncoderConfig(
            architecture=architecture,
            hidden_size=hidden,
            num_layers=fields.whole('num_hidden_layers', 1, 1024),
            num_heads=heads,
            intermediate_size=fields.whole('intermediate_size', 1, 1 << 20),
            vocab_size=fields.whole('vocab_size', 1, 1 << 22),
            positions=positions,
            first_position=first,
            token_types=fields.whole('type_vocab_size', 0, 1 << 10, 2),
            norm_eps=fields.number('layer_norm_eps', 0.0, 1.0, 1e-12),
            activation=ACTIVATIONS[activation],
            dtype_name=dtype,
        )


def is_encoder(path: Path) -> bool:
    """Whether the model in a folder is an encoder; what is wrong with a folder is told by who loads it."""
    try:
        config = json.loads((path / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and _architecture(config) in ENCODERS


def refuse_encoder(path: Path) -> None:
    """For all that writes text.

    Raises:
        ConfigError: LMD-119, the model is an encoder.
    """
    if is_encoder(path):
        raise ConfigError('LMD-119', model=path.name)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get('architectures')
    return str(names[0]) if isinstance(names, list) and names else ''
