"""Embedding and LMHead: the two ends of a decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.ops.embedding import embed
from lmdeploy.ops.quantize import TokenCodes
from lmdeploy.parallel.group import Group
from lmdeploy.parallel.split import Split
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Prefix


def rows_of(vocab_size: int, group: Group) -> list[Tensor]:
    """For every rank the tokens whose rows of a table it holds; -1 fills up the last ones, so that all hold as many."""
    each = -(-vocab_size // group.size)
    tokens = F.pad(torch.arange(vocab_size), (0, each * group.size - vocab_size), value=-1)
    return list(tokens.view(group.size, each))


class Embedding:
    """Token ids ``[T]`` to ``[T, hidden]``, times ``scale`` (rounded to the model's type, as it was trained)."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        self.build, self.vocab_size, self.hidden_size = build, vocab_size, hidden_size
        self.scale = torch.tensor(scale, dtype=build.dtype).item()
        self.weight: Tensor  # this rank's rows

    def load(self, prefix: Prefix) -> None:
        weight = prefix.get('weight', (self.vocab_size, self.hidden_size), self.build.dtype)
        group = self.build.group
        if group.size > 1:
            own = rows_of(self.vocab_size, group)[group.rank].to(weight.device)
            weight = weight[own.clamp(min=0)].masked_fill_(own[:, None] < 0, 0)
        self.weight = weight.to(self.build.device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        group = self.build.group
        if group.size == 1:
            return embed(token_ids, self.weight, self.scale)
        local = token_ids - group.rank * len(self.weight)
        known = (local >= 0) & (local < len(self.weight))
        rows = embed(local.clamp(0, len(self.weight) - 1), self.weight, self.scale)
        return group.all_reduce(rows.masked_fill_(~known[:, None], 0))


CANDIDATES = 64  # logits per row that are worth full precision


class LMHead(Linear):
    """Hidden states ``[R, hidden]`` to logits ``[R, vocab] float32``; its weight may be the embedding's."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        super().__init__(build, hidden_size, (vocab_size,), split=Split.OUT, shares=rows_of(vocab_size, build.group))
        self._table: Tensor | None = None  # the embedding's, where it is shared and products with it are rounded

    def tie(self, embedding: Embedding) -> None:
        """Multiply with the embedding's table. A kernel that packs keeps a copy in its own layout."""
        weight = embedding.weight
        scheme = dense_scheme(weight.element_size() * 8)
        self.put(LinearBundle(scheme, len(weight), embedding.hidden_size, weight=weight))
        self._table = weight if self._rounds else None

    def __call__(self, x: Tensor | TokenCodes) -> Tensor:
        assert isinstance(x, Tensor)  # logits are worth exact hidden states
        logits = self.apply_float(x)
        if self._table is not None:
            logits = sharpen(logits, x, self._table)
        if self.build.group.size == 1:
            return logits
        return self.build.group.all_gather(logits)[:, : self.out_features[0]].contiguous()


def sharpen(logits: Tensor, hidden: Tensor, table: Tensor) -> Tensor:
    """Put the best logits of each row right to float32; ``logits [R, vocab] float32`` is changed and returned.

    A 16-bit product is rounded when it is stored: bfloat16 leaves steps of 1/8 at a logit of 20, where the best tokens
    of a small model often differ by less, so that the first of several equals would win. The products of the best
    candidates are cheap to do again from ``hidden [R, hidden]`` and ``table [vocab, hidden]`` without that rounding.
    Rows do not depend on each other.
    """
    best = logits.topk(min(CANDIDATES, logits.shape[1]), dim=1, sorted=False).indices
    exact = (F.embedding(best, table).float() * hidden.float().unsqueeze(1)).sum(-1)
    return logits.scatter_(1, best, exact)
