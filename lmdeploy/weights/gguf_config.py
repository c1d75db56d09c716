"""GGUF metadata as the config.json that a Hugging Face checkpoint of the same model would have."""

from __future__ import annotations

import math
import struct
from typing import Any

from lmdeploy.errors import LoadError
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.gguf import GGUFHeader, TensorRecord
from lmdeploy.weights.gguf_names import ARCHITECTURES, GGUFArchitecture

ROPE_FACTORS = 'rope_freqs.weight'
GEMMA3_27B_LAYERS = 62  # the one Gemma 3 whose attention scale is not that of its head size


class GGUFConfig:
    """Reads one file's metadata, every value checked for its type.

    Raises:
        LoadError: LMD-137 unknown architecture, LMD-138 a value that is missing, of another type or impossible.
    """

    def __init__(self, header: GGUFHeader, file: ByteFile) -> None:
        self._header = header
        self._file = file
        self._tensors = {record.name: record for record in header.tensors}
        self.name = header.get('general.architecture')
        if not isinstance(self.name, str) or self.name not in ARCHITECTURES:
            raise LoadError('LMD-137', file=file.path, found=str(self.name)[:80], known=', '.join(ARCHITECTURES))
        self.arch: GGUFArchitecture = ARCHITECTURES[self.name]
        if self._optional('split.count', int, 1, scoped=False) > 1:
            raise self._bad('split.count', 'says that the model is split over several files; join them with '
                            'llama-gguf-split --merge')  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The synthesised config.json."""
        heads = self._uniform('attention.head_count')
        hidden = self._required('embedding_length', int)
        head_dim = self._optional('attention.key_length', int, 0) or self._default_head_dim(hidden, heads)
        if self._optional('attention.value_length', int, head_dim) != head_dim:
            raise self._bad('attention.value_length', f'differs from the key length {head_dim}')
        if self._optional('rope.dimension_count', int, head_dim) != head_dim:
            raise self._bad('rope.dimension_count', f'differs from the head size {head_dim} (partial rotation)')
        config = {
            'architectures': [self.arch.hf_class],
            'model_type': self.arch.model_type,
            'hidden_size': hidden,
            'intermediate_size': self._uniform('feed_forward_length'),
            'num_hidden_layers': self._required('block_count', int),
            'num_attention_heads': heads,
            'num_key_value_heads': self._uniform('attention.head_count_kv', heads),
            'head_dim': head_dim,
            'max_position_embeddings': self._required('context_length', int),
            'rms_norm_eps': self._float('attention.layer_norm_rms_epsilon'),
            'rope_theta': self._float('rope.freq_base', 10000.0),
            'rope_scaling': None,
            'vocab_size': self._vocab_size(),
            'tie_word_embeddings': 'output.weight' not in self._tensors,
            'attention_bias': 'blk.0.attn_q.bias' in self._tensors,
            'mlp_bias': 'blk.0.ffn_up.bias' in self._tensors,
            'hidden_act': 'silu',
            'torch_dtype': self._dtype_name(),
            'bos_token_id': self._token_id('bos'),
            'eos_token_id': self._token_id('eos'),
        }
        config['rope_scaling'] = self._rope_scaling(config)
        if self.name == 'gemma3':
            self._add_gemma3(config)
        return config

    def generation_config(self) -> dict[str, Any]:
        """The end tokens that the file names besides eos (end of turn, end of message), if any."""
        ids = [self._token_id(kind) for kind in ('eos', 'eot', 'eom')]
        unique = list(dict.fromkeys(i for i in ids if i is not None))
        return {'eos_token_id': unique} if len(unique) > 1 else {}

    def _bad(self, key: str, reason: str) -> LoadError:
        return LoadError('LMD-138', file=self._file.path, key=key, reason=reason)

    def _value(self, key: str, kind: type, scoped: bool = True) -> Any:
        full = f'{self.name}.{key}' if scoped else key
        value = self._header.get(full)
        if value is not None and type(value) is not kind:
            raise self._bad(full, f'is {value!r:.80}, not of type {kind.__name__}')
        return value

    def _required(self, key: str, kind: type) -> Any:
        value = self._value(key, kind)
        if value is None:
            raise self._bad(f'{self.name}.{key}', 'is missing')
        return value

    def _optional(self, key: str, kind: type, default: Any, scoped: bool = True) -> Any:
        value = self._value(key, kind, scoped)
        return default if value is None else value

    def _uniform(self, key: str, default: int | None = None) -> int:
        """An integer that may also be given per layer, if all layers agree."""
        value = self._header.get(f'{self.name}.{key}', default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or value < 1:
            raise self._bad(f'{self.name}.{key}', f'is {value!r:.80}, not one positive integer for all layers')
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        value = self._required(key, float) if default is None else self._optional(key, float, default)
        if not 0.0 < value < math.inf:  # NaN fails too
            raise self._bad(f'{self.name}.{key}', f'is {value}, not a positive number')
        return shortest_float32(value)

    def _default_head_dim(self, hidden: int, heads: int) -> int:
        if hidden % heads:
            raise self._bad(f'{self.name}.attention.head_count', f'is {heads}, which does not divide {hidden}')
        return hidden // heads

    def _token_id(self, kind: str) -> int | None:
        return self._optional(f'tokenizer.ggml.{kind}_token_id', int, None, scoped=False)

    def _vocab_size(self) -> int:
        record = self._tensors.get('token_embd.weight')
        if record is None:
            raise LoadError('LMD-132', tensor='token_embd.weight', file=self._file.path)
        return record.shape[0]

    def _dtype_name(self) -> str:
        """float32 or float16 if most of the file is stored so, else bfloat16, whose range any model fits."""
        sizes: dict[str, int] = {}
        for record in self._tensors.values():
            sizes[record.dtype_name] = sizes.get(record.dtype_name, 0) + record.nbytes
        most = max(sizes, key=sizes.__getitem__)
        return {'F32': 'float32', 'F16': 'float16'}.get(most, 'bfloat16')

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        factors = self._tensors.get(ROPE_FACTORS)
        if factors is not None:
            if factors.shape != (config['head_dim'] // 2,):
                raise self._bad(ROPE_FACTORS, f'has the shape {factors.shape} for heads of size {config["head_dim"]}')
            return llama3_scaling(self._read_floats(factors), config['rope_theta'])
        kind = self._optional('rope.scaling.type', str, 'none')
        factor = self._optional('rope.scaling.factor', float, self._optional('rope.scale_linear', float, 0.0))
        if kind == 'none' and factor not in (0.0, 1.0):
            kind = 'linear'  # files that predate the type key
        if kind == 'none' or (kind == 'linear' and factor in (0.0, 1.0)):
            return None
        if not 0.0 < factor < math.inf:
            raise self._bad(f'{self.name}.rope.scaling.factor', f'is {factor}, not a positive number')
        scaling: dict[str, Any] = {'rope_type': kind, 'factor': shortest_float32(factor)}
        original = self._optional('rope.scaling.original_context_length', int, 0)
        if original:
            scaling['original_max_position_embeddings'] = original
        for key, hf in (('yarn_beta_fast', 'beta_fast'), ('yarn_beta_slow', 'beta_slow')):
            value = self._optional(f'rope.scaling.{key}', float, None)
            if value is not None:
                scaling[hf] = shortest_float32(value)
        attention = self._optional('rope.scaling.attn_factor', float, 1.0)
        if kind == 'yarn' and attention != 1.0:  # multiplies the usual factor there, replaces it here
            scaling['attention_factor'] = attention * (0.1 * math.log(factor) + 1.0)
        return scaling

    def _read_floats(self, record: TensorRecord) -> list[float]:
        if record.dtype_name != 'F32' or len(record.shape) != 1 or record.nbytes > 1 << 16:
            raise self._bad(record.name, f'is of type {record.dtype_name} and shape {record.shape}')
        values = struct.unpack(f'<{record.shape[0]}f', self._file.read(record.offset, record.nbytes))
        if not all(0.0 < value < math.inf for value in values):
            raise self._bad(record.name, 'has values that are not positive numbers')
        return list(values)

    def _add_gemma3(self, config: dict[str, Any]) -> None:
        layers, heads = config['num_hidden_layers'], config['num_attention_heads']
        scalar = config['hidden_size'] // heads if layers == GEMMA3_27B_LAYERS else config['head_dim']
        config.update(
            hidden_act='gelu_pytorch_tanh',
            hidden_activation='gelu_pytorch_tanh',
            query_pre_attn_scalar=scalar,
            sliding_window=self._required('attention.sliding_window', int),
            sliding_window_pattern=self._optional('attention.sliding_window_pattern', int, 6),
            rope_local_base_freq=self._float('rope.freq_base_swa', 10000.0),
            rope_theta=self._float('rope.freq_base', 1_000_000.0),
            final_logit_softcapping=self._optional('final_logit_softcapping', float, None),
            attn_logit_softcapping=self._optional('attn_logit_softcapping', float, None),
        )


def shortest_float32(value: float) -> float:
    """The shortest decimal that a float32 reads as ``value``: 9.999999974752427e-07 was written as 1e-06."""
    for digits in range(1, 10):
        text = f'{value:.{digits}g}'
        try:
            if struct.pack('<f', float(text)) == struct.pack('<f', value):
                return float(text)
        except OverflowError:  # rounded up past the largest float32
            continue
    return value


def llama3_scaling(factors: list[float], theta: float) -> dict[str, Any]:
    """The ``llama3`` rope parameters whose frequency divisors ``[head_dim / 2]`` these are.

    Files keep the divisors only. They are 1 for short wavelengths, the scaling factor for long ones and blend in
    between; which wavelengths those are follows from the original context length. Divisors that no known length
    explains are handed on as the rope type ``'frequency_factors'``.
    """
    factor = max(factors)
    for original in (8192, 4096, 16384, 32768, 2048):
        scaling = {
            'rope_type': 'llama3',
            'factor': shortest_float32(factor),
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': original,
        }
        wanted = _llama3_divisors(scaling, theta, len(factors))
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(wanted, factors)):
            return scaling
    return {'rope_type': 'frequency_factors', 'factors': factors}


def _llama3_divisors(scaling: dict[str, Any], theta: float, count: int) -> list[float]:
    low, high, factor = scaling['low_freq_factor'], scaling['high_freq_factor'], scaling['factor']
    divisors = []
    for i in range(count):
        turns = scaling['original_max_position_embeddings'] / (2 * math.pi * theta ** (i / count))
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - blend) / factor + blend))
    return divisors
