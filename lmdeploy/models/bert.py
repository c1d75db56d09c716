"""BERT: a bidirectional encoder of whole texts (Devlin et al., 2018), and RoBERTa, which differs in its positions.

A step has several texts, one after the other, without padding; only attention looks at them as a padded batch. There is
no cache: a text is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.encoder import EncoderConfig, Pooling
from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.nn.mlp import MLP
from lmdeploy.nn.norm import LayerNorm
from lmdeploy.weights.checkpoint import Prefix

IGNORE = (r'embeddings\.position_ids$', r'(^|\.)pooler\.', r'(^|\.)cls\.', r'(^|\.)lm_head\.')
"""The heads of the tasks that it was trained on, and a buffer that older versions stored."""
ROOTS = ('', 'bert', 'roberta')


@dataclass(frozen=True, slots=True)
class Texts:
    """Where the texts of a step lie, and how they are a padded batch: B texts, T tokens, the longest has L.

    Attributes:
        starts: ``[B] int64``, each text's first token.
        lengths: ``[B] int64``.
        places: ``[T] int64``, each token's place in its text.
        pad: ``[B, L] int64``, the token at each place of the batch; behind a text's end, any.
        there: ``[B, L] bool``, whether it is one of the text.
        back: ``[T] int64``, each token's place in the flattened batch.
        full: all texts have L tokens.
    """

    starts: Tensor
    lengths: Tensor
    places: Tensor
    pad: Tensor
    there: Tensor
    back: Tensor
    full: bool

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Texts:
        """Of texts with so many tokens, at least one each."""
        sizes = torch.tensor(lengths, dtype=torch.int64)
        starts = sizes.cumsum(0) - sizes
        columns = torch.arange(int(sizes.max()))
        there = columns < sizes[:, None]
        pad = starts[:, None] + torch.minimum(columns, sizes[:, None] - 1)
        return Texts(starts.to(device), sizes.to(device), there.nonzero()[:, 1].to(device), pad.to(device),
                     there.to(device), there.flatten().nonzero()[:, 0].to(device), len(set(lengths)) == 1)


class Layer:
    """Attention and MLP, each followed by the norm of its sum with what went in."""

    def __init__(self, config: EncoderConfig, build: Build) -> None:
        hidden = config.hidden_size
        self.heads = config.num_heads
        self.qkv = Linear(build, hidden, (hidden,) * 3, bias=True)
        self.o = Linear(build, hidden, (hidden,), bias=True)
        self.mlp = MLP(build, hidden, config.intermediate_size, config.activation)
        self.attention_norm = LayerNorm(build, hidden, config.norm_eps)
        self.mlp_norm = LayerNorm(build, hidden, config.norm_eps)

    def load(self, prefix: Prefix) -> None:
        attention = prefix.child('attention')
        self.qkv.load(*(attention.child(f'self.{name}') for name in ('query', 'key', 'value')))
        self.o.load(attention.child('output.dense'))
        self.attention_norm.load(attention.child('output.LayerNorm'))
        self.mlp.load(prefix.child('intermediate.dense'), prefix.child('output.dense'))
        self.mlp_norm.load(prefix.child('output.LayerNorm'))

    def __call__(self, x: Tensor, texts: Texts) -> Tensor:
        x = self.attention_norm(x + self.o(self._attend(self.qkv(x), texts)))
        return self.mlp_norm(x + self.mlp(x))

    def _attend(self, qkv: Tensor, texts: Texts) -> Tensor:
        """``[T, 3 * hidden]`` to ``[T, hidden]``."""
        batch, longest = texts.pad.shape
        q, k, v = qkv[texts.pad].view(batch, longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        mask = None if texts.full else texts.there[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(batch * longest, -1)[texts.back]


class Bert:
    """The encoder; see the module."""

    def __init__(self, config: EncoderConfig, build: Build) -> None:
        self.config, self.build = config, build
        self.layers = [Layer(config, build) for _ in range(config.num_layers)]
        self.norm = LayerNorm(build, config.hidden_size, config.norm_eps)
        self.words: Tensor
        self.positions: Tensor  # with the first token type: every token of a text is of it

    def load(self, prefix: Prefix) -> None:
        """Pull the weights.

        Raises:
            LoadError: a tensor is missing or has the wrong shape.
        """
        config, build = self.config, self.build
        root = next((child for child in map(prefix.child, ROOTS) if child.has('embeddings')), prefix)
        tables = root.child('embeddings')
        hidden = config.hidden_size
        self.words = tables.get('word_embeddings.weight', (config.vocab_size, hidden), build.dtype).to(build.device)
        positions = tables.get('position_embeddings.weight', (config.positions, hidden), torch.float32)
        if config.token_types:
            types = tables.get('token_type_embeddings.weight', (config.token_types, hidden), torch.float32)
            positions = positions + types[0]
        self.positions = positions.to(build.dtype).to(build.device)
        self.norm.load(tables.child('LayerNorm'))
        for i, layer in enumerate(self.layers):
            layer.load(root.child(f'encoder.layer.{i}'))

    def __call__(self, token_ids: Tensor, texts: Texts) -> Tensor:
        """``token_ids [T] int64`` to hidden states ``[T, hidden]``."""
        x = F.embedding(token_ids, self.words)
        x = self.norm(x + F.embedding(texts.places + self.config.first_position, self.positions))
        for layer in self.layers:
            x = layer(x, texts)
        return x


def pool(hidden: Tensor, texts: Texts, pooling: Pooling) -> Tensor:
    """Hidden states ``[T, hidden]`` to one vector per text, ``[B, hidden] float32``."""
    hidden = hidden.float()
    if pooling.mode == 'cls':
        vectors = hidden[texts.starts]
    elif pooling.mode == 'max':
        vectors = hidden[texts.pad].masked_fill(~texts.there[:, :, None], -torch.inf).amax(1)
    else:
        vectors = (hidden[texts.pad] * texts.there[:, :, None]).sum(1) / texts.lengths[:, None]
    return F.normalize(vectors, dim=1) if pooling.normalise else vectors
