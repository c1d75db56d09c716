"""Embedding and LMHead: the two ends of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.quantization import FLOAT, INT, Storage
from lmdeploy.log import get_logger
from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.ops.embedding import embed
from lmdeploy.ops.quantize import TokenCodes
from lmdeploy.parallel.group import Group
from lmdeploy.parallel.split import Split
from lmdeploy.quant.blocks import rounded
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import expect, scheme_of
from lmdeploy.quant.formats.gguf import SCHEMES, holds_blocks
from lmdeploy.quant.kernels import Dequantised, HasRows, KernelCase, choose_kernel
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Prefix
from lmdeploy.weights.dequant import dequantize


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
        self.weight: Tensor  # this rank's rows, or blocks of them
        self.blocks = ''  # the GGUF type of the blocks

    def load(self, prefix: Prefix) -> None:
        if self.build.policy.blocks and holds_blocks(prefix):
            self.blocks = prefix.dtype_name('weight')
            expect(prefix, 'weight', ((self.vocab_size, self.hidden_size),), (self.blocks,), 'gguf')
            weight = prefix.raw('weight').data
        else:
            weight = prefix.get('weight', (self.vocab_size, self.hidden_size), self.build.dtype)
        group = self.build.group
        if group.size > 1:
            own = rows_of(self.vocab_size, group)[group.rank].to(weight.device)
            weight = weight[own.clamp(min=0)].masked_fill_(own[:, None] < 0, 0)
        self.weight = weight.to(self.build.device)

    @property
    def bundle(self) -> LinearBundle:
        """The table as a linear layer from hidden states to this rank's tokens."""
        weight, tokens = self.weight, len(self.weight)
        if self.blocks:
            return LinearBundle(SCHEMES[self.blocks], tokens, self.hidden_size, codes=weight)
        return LinearBundle(dense_scheme(weight.element_size() * 8), tokens, self.hidden_size, weight=weight)

    def rows(self, ids: Tensor) -> Tensor:
        """This rank's rows ``ids [n]``: ``[n, hidden] float32``, unscaled."""
        rows = self.weight.index_select(0, ids)
        return dequantize(rows, self.blocks) if self.blocks else rows.float()

    def __call__(self, token_ids: Tensor) -> Tensor:
        group = self.build.group
        if group.size == 1:
            return self._embed(token_ids)
        local = token_ids - group.rank * len(self.weight)
        known = (local >= 0) & (local < len(self.weight))
        rows = self._embed(local.clamp(0, len(self.weight) - 1))
        return group.all_reduce(rows.masked_fill_(~known[:, None], 0))

    def _embed(self, ids: Tensor) -> Tensor:
        if not self.blocks:
            return embed(ids, self.weight, self.scale)
        rows = self.rows(ids).to(self.build.dtype)
        return rows if self.scale == 1.0 else rows * self.scale


CANDIDATES = 64  # logits per row that are worth full precision
HEADS = {'int8': Storage(INT), 'float8_e4m3fn': Storage(FLOAT, 'float8_e4m3fn')}  # one scale for each token
Rows = Callable[[Tensor], Tensor]  # ids ``[n]`` to the weights ``[n, in] float32`` of these outputs


class LMHead(Linear):
    """Hidden states ``[R, hidden]`` to logits ``[R, vocab] float32``; its weight may be the embedding's."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        super().__init__(build, hidden_size, (vocab_size,), split=Split.OUT, shares=rows_of(vocab_size, build.group))
        self._rows: Rows | None = None  # what this layer multiplies with, where products are rounded on their way

    def tie(self, embedding: Embedding) -> None:
        """Multiply with the embedding's table. A kernel that packs keeps a copy in its own layout."""
        self.put(embedding.bundle)
        self._rows = embedding.rows if self._rounds else None

    def put(self, bundle: LinearBundle) -> None:
        """As that of :class:`Linear`; a dense weight becomes codes where that is wanted and a kernel takes them."""
        super().put(self._narrow(bundle))
        if self._rounds and isinstance(self.kernel, HasRows) and not bundle.input_transform:
            self._rows = partial(self.kernel.rows, packed=self._packed)

    def _narrow(self, bundle: LinearBundle) -> LinearBundle:
        build = self.build
        if not build.head or not bundle.scheme.dense:
            return bundle
        storage = HEADS[build.head]
        case = KernelCase(scheme_of(storage), build.dtype, build.device, bundle.out_features, bundle.in_features)
        if choose_kernel(case).name == Dequantised.name:
            get_logger().warning('the output head stays as it is: no kernel multiplies %s here', case.scheme)
            return bundle
        return rounded(bundle, storage)

    def __call__(self, x: Tensor | TokenCodes) -> Tensor:
        assert isinstance(x, Tensor)  # logits are worth exact hidden states
        logits = self.apply_float(x)
        if self._rows is not None:
            logits = sharpen(logits, x, self._rows)
        if self.build.group.size == 1:
            return logits
        return self.build.group.all_gather(logits)[:, : self.out_features[0]].contiguous()


def sharpen(logits: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
    """Put the best logits of each row right to float32; ``logits [R, vocab] float32`` is changed and returned.

    A 16-bit product is rounded when it is stored: bfloat16 leaves steps of 1/8 at a logit of 20, where the best tokens
    of a small model often differ by less, so that the first of several equals would win. The products of the best
    candidates are cheap to do again from ``hidden [R, hidden]`` and their rows of the weight without that rounding.
    Rows do not depend on each other.
    """
    best = logits.topk(min(CANDIDATES, logits.shape[1]), dim=1, sorted=False).indices
    exact = (rows(best.flatten()).view(*best.shape, -1) * hidden.float().unsqueeze(1)).sum(-1)
    return logits.scatter_(1, best, exact)
