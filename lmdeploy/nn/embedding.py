"""Embedding and LMHead: the two ends of a decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Prefix


class Embedding:
    """Token ids ``[T]`` to ``[T, hidden]``, times ``scale`` (rounded to the model's type, as it was trained)."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        self.build, self.vocab_size, self.hidden_size = build, vocab_size, hidden_size
        self.scale = torch.tensor(scale, dtype=build.dtype).item()
        self.weight: Tensor

    def load(self, prefix: Prefix) -> None:
        weight = prefix.get('weight', (self.vocab_size, self.hidden_size), self.build.dtype)
        self.weight = weight.to(self.build.device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        x = F.embedding(token_ids, self.weight)
        return x if self.scale == 1.0 else x * self.scale


class LMHead(Linear):
    """Hidden states ``[R, hidden]`` to logits ``[R, vocab] float32``; its weight may be the embedding's."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        super().__init__(build, hidden_size, (vocab_size,))

    def tie(self, embedding: Embedding) -> None:
        """Multiply with the embedding's table. A kernel that packs keeps a copy in its own layout."""
        weight = embedding.weight
        scheme = dense_scheme(weight.element_size() * 8)
        self.set(LinearBundle(scheme, embedding.vocab_size, embedding.hidden_size, weight=weight))

    def __call__(self, hidden: Tensor) -> Tensor:
        return super().__call__(hidden).float()
