"""Source: the model that is to be quantised, read layer by layer as float32."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmdeploy.config.model import SLIDING, ModelConfig
from lmdeploy.errors import ConfigError, LoadError
from lmdeploy.lite.recipe import LayerWeights, LinearWeights, TopWeights
from lmdeploy.models.registry import decoder_spec
from lmdeploy.models.shapes import tensor_shapes
from lmdeploy.models.spec import DecoderSpec
from lmdeploy.weights.checkpoint import Checkpoint, Prefix, open_checkpoint
from lmdeploy.weights.dummy import DummyCheckpoint, read_config

MAX_LISTED = 5


@dataclass(slots=True)
class Source:
    """An open model. Everything that could stop the work later is refused by :func:`open_source`.

    Attributes:
        body: the decoder's root. head: the output layer's prefix, which a tied model need not have.
        others: tensors outside of the language model (a vision tower, a projector), which are copied.
        dtype: of dense tensors that are written.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    spec: DecoderSpec
    body: Prefix
    head: Prefix
    others: tuple[str, ...]
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def layer_path(self, index: int) -> str:
        """``'model.layers.3'``"""
        return self.body.child(f'{self.spec.names.layers}.{index}').path

    def window(self, index: int) -> int:
        """Tokens that a query of the layer sees; 0: all before it."""
        return self.config.sliding_window if self.config.layer_types[index] == SLIDING else 0

    def linear_names(self) -> dict[str, str]:
        """Names below a layer by role; the parts of a packed layer have the same."""
        names = self.spec.names
        qkv = (names.packed_qkv,) * 3 if names.packed_qkv else names.qkv
        return {
            **{role: f'{names.attention}.{name}' for role, name in zip('qkv', qkv)},
            'o': f'{names.attention}.{names.o}',
            **{role: f'{names.mlp}.{name}' for role, name in zip(('gate', 'up'), names.gate_up)},
            'down': f'{names.mlp}.{names.down}',
        }

    def norm_names(self) -> dict[str, str]:
        """Names below a layer by role."""
        names, spec = self.spec.names, self.spec
        found = {'attention': names.attention_norm, 'mlp': names.mlp_norm}
        if spec.post_norms:
            found |= {'attention_post': names.attention_post_norm, 'mlp_post': names.mlp_post_norm}
        if spec.qk_norm:
            found |= {role: f'{names.attention}.{role}_norm' for role in 'qk'}
        return found

    def layer(self, index: int, device: torch.device, *, root: Prefix | None = None) -> LayerWeights:
        """Read a layer, dense and in float32."""
        config = self.config
        prefix = root or Prefix(self.checkpoint, self.layer_path(index))
        linears: dict[str, LinearWeights] = {}
        names = self.linear_names()
        if self.spec.names.packed_qkv:
            rows = packed_rows(config)
            whole = _read_linear('qkv', names['q'], prefix, device)
            for role, picked in zip('qkv', rows):
                index_ = picked.to(device)
                bias = None if whole.bias is None else whole.bias[index_]
                linears[role] = LinearWeights(role, names[role], whole.weight[index_], bias)
        for role, name in names.items():
            if role not in linears:
                linears[role] = _read_linear(role, name, prefix, device)
        norms = {role: self.read_norm(prefix.child(name), device) for role, name in self.norm_names().items()}
        return LayerWeights(index, linears, norms, config.num_heads, config.num_kv_heads, config.head_dim)

    def read_norm(self, prefix: Prefix, device: torch.device) -> Tensor:
        """A norm's weight as it multiplies."""
        weight = prefix.get('weight', dtype=torch.float32).to(device)
        return weight + 1.0 if self.spec.norm_plus_one else weight

    def stored_norm(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`read_norm`, in the type in which it is written."""
        return (weight - 1.0 if self.spec.norm_plus_one else weight).to(self.dtype)

    def read_embedding(self, device: torch.device) -> Tensor:
        """``[vocab, hidden]`` in the type in which it is written."""
        return self.body.child(self.spec.names.embedding).get('weight', dtype=self.dtype).to(device)

    def top(self, device: torch.device) -> TopWeights:
        """Everything outside of the layers, in float32."""
        names, tied = self.spec.names, self.config.tie_word_embeddings
        embedding = self.body.child(names.embedding).get('weight', dtype=torch.float32).to(device)
        head = embedding if tied else self.head.get('weight', dtype=torch.float32).to(device)
        return TopWeights(embedding, self.read_norm(self.body.child(names.final_norm), device), head, tied)

    def top_names(self) -> dict[str, str]:
        """Full names of ``embedding``, ``norm`` and ``head``."""
        names = self.spec.names
        below = {'embedding': self.body.child(names.embedding), 'norm': self.body.child(names.final_norm),
                 'head': self.head}  # fmt: skip
        return {role: f'{prefix.path}.weight' for role, prefix in below.items()}

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """``(role, out, in)`` of the linears of a layer."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        yield from (('q', q, c.hidden_size), ('k', kv, c.hidden_size), ('v', kv, c.hidden_size))
        yield 'o', c.hidden_size, q
        yield from (('gate', c.intermediate_size, c.hidden_size), ('up', c.intermediate_size, c.hidden_size))
        yield 'down', c.hidden_size, c.intermediate_size


def packed_rows(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of q, k and v in a packed projection, which lie by key head: its query heads, its key, its value."""
    group = config.num_heads // config.num_kv_heads
    width = config.num_kv_heads * (group + 2) * config.head_dim
    rows = torch.arange(width).view(config.num_kv_heads, group + 2, config.head_dim)
    return rows[:, :group].flatten(), rows[:, group].flatten(), rows[:, group + 1].flatten()


def open_source(path: Path, dtype: torch.dtype | None = None, *, dummy: torch.device | None = None) -> Source:
    """Open the model at ``path`` and refuse what cannot be quantised.

    Args:
        path: a model folder or a GGUF file.
        dtype: of dense tensors in the output; None: the model's own, bfloat16 where it names none or float32.
        dummy: make random weights of the config's shapes there, for measuring.

    Raises:
        ConfigError: LMD-110 an unknown architecture; LMD-600 it is quantised already; LMD-601 it has modules that are
            not of its architecture.
        LoadError: what is wrong with its files.
    """
    checkpoint = open_checkpoint(path) if dummy is None else _dummy(path, dummy)
    try:
        config = ModelConfig.from_dict(checkpoint.config)
        spec = decoder_spec(config)
        if config.quantization is not None:
            raise ConfigError('LMD-600', model=path, method=config.quantization.method)
        prefix, names = checkpoint.prefix(), spec.names
        body = prefix.child(next((root for root in names.roots if prefix.has(root)), names.roots[0]))
        head = prefix.child(next((head for head in names.heads if prefix.has(head)), names.heads[0]))
        stored = {'bfloat16': torch.bfloat16, 'float16': torch.float16}.get(config.dtype_name, torch.bfloat16)
        source = Source(checkpoint, config, spec, body, head, (), dtype or stored)
        source.others = _others(source)
        return source
    except (ConfigError, LoadError):
        checkpoint.close()
        raise


class _Dummy(DummyCheckpoint):
    """One whose tensors depend on their names alone, so that each can be read again."""

    def get(self, name: str, shape: tuple[int | None, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        self._generator.manual_seed(zlib.crc32(name.encode()))
        return super().get(name, shape, dtype)


def _dummy(path: Path, device: torch.device) -> Checkpoint:
    values = read_config(path)
    shapes = tensor_shapes(decoder_spec(ModelConfig.from_dict(values)))
    return _Dummy(path, values, shapes, device)


def _read_linear(role: str, name: str, prefix: Prefix, device: torch.device) -> LinearWeights:
    below = prefix.child(name)
    weight = below.get('weight', (None, None)).to(device).float()
    bias = below.get('bias', (weight.shape[0],)).to(device).float() if below.has('bias') else None
    return LinearWeights(role, name, weight, bias)


def _others(source: Source) -> tuple[str, ...]:
    """Tensors outside of the language model, after a check that there are none inside that nobody knows.

    Raises:
        ConfigError: LMD-601.
        LoadError: LMD-132, LMD-133: a tensor is missing or of another shape.
    """
    names, spec, checkpoint = source.spec.names, source.spec, source.checkpoint
    _check_shapes(source)
    known = set(source.top_names().values())
    for i in range(source.num_layers):
        path = source.layer_path(i)
        known |= {f'{path}.{name}.{kind}' for name in source.linear_names().values() for kind in ('weight', 'bias')}
        known |= {f'{path}.{name}.weight' for name in source.norm_names().values()}
    ignored = [re.compile(pattern) for pattern in spec.names.ignore]
    left = [name for name in checkpoint.names() if name not in known
            and not any(pattern.search(name) for pattern in ignored)]  # fmt: skip
    layers = f'{source.body.child(names.layers).path}.'
    inside = [name for name in left if name.startswith(layers)]
    if inside:
        raise ConfigError('LMD-601', model=source.path, count=len(inside), architecture=source.config.architecture,
                          tensors=', '.join(inside[:MAX_LISTED]))  # fmt: skip
    return tuple(left)


def _check_shapes(source: Source) -> None:
    config, checkpoint = source.config, source.checkpoint
    packed = source.spec.names.packed_qkv
    sizes = {role: (out, wide) for role, out, wide in source.sizes()}
    for i in range(source.num_layers):
        for role, name in source.linear_names().items():
            wanted = sizes[role]
            if packed and role in 'qkv':
                wanted = sum(sizes[part][0] for part in 'qkv'), wanted[1]
            full = f'{source.layer_path(i)}.{name}.weight'
            found = checkpoint.stored(full).shape
            if tuple(found) != wanted:
                raise LoadError('LMD-133', tensor=full, file=checkpoint.path, found=list(found), wanted=list(wanted))
    tops = source.top_names()
    for role, shape in (('embedding', (config.vocab_size, config.hidden_size)), ('norm', (config.hidden_size,)),
                        ('head', (config.vocab_size, config.hidden_size))):  # fmt: skip
        if role == 'head' and config.tie_word_embeddings:
            continue
        found = checkpoint.stored(tops[role]).shape
        if tuple(found) != shape:
            raise LoadError('LMD-133', tensor=tops[role], file=checkpoint.path, found=list(found), wanted=list(shape))
