"""Attention: one layer's self-attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionBackend, Rotation
from lmdeploy.kv.cache import KVLayer
from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.nn.norm import RMSNorm
from lmdeploy.ops.kv_codes import KeyBasis, KeyOffset, Turns
from lmdeploy.ops.quantize import TokenCodes
from lmdeploy.parallel.heads import channels, share_heads
from lmdeploy.parallel.split import Split
from lmdeploy.runner.batch import ForwardBatch

SPREAD = 8  # positions between the tokens by which axes are chosen: texts are longer than samples


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The constants of one layer.

    Attributes:
        scale: factor of the scores.
        window: tokens that a query sees, itself included; 0 means all.
        qk_norm: queries and keys are normalised per head, with weights that store their difference from 1 if
            ``norm_plus_one``.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    eps: float = 1e-6


class Attention:
    """q, k and v as one linear, optional norms, rotation, the backend, and the output linear.

    Attributes:
        whole, shape: of the layer, and of this rank's part of it.
    """

    def __init__(self, build: Build, shape: AttentionShape, backend: AttentionBackend) -> None:
        self.backend = backend
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        heads = [share_heads(shape.heads, shape.kv_heads, rank, build.group.size) for rank in range(build.group.size)]
        queries = [channels(one.queries, shape.head_dim) for one in heads]
        keys = [channels(one.keys, shape.head_dim) for one in heads]
        parts = [torch.cat((own, q + key, q + kv + key)) for own, key in zip(queries, keys)]
        self.qkv = Linear(build, shape.hidden_size, (q, kv, kv), shape.qkv_bias, Split.OUT, parts)
        self.o = Linear(build, q, (shape.hidden_size,), shape.o_bias, Split.IN, queries)
        own = heads[build.group.rank]
        self.whole, self.shape = shape, replace(shape, heads=len(own.queries), kv_heads=len(own.keys))
        self.offset: KeyOffset | None = None  # what the keys have in common, which the cache need not hold
        self.basis: KeyBasis | None = None  # their axes in codes of 4 bits
        self._sampling: Turns | None = None  # the next call finds these axes
        self.qk_norms: tuple[RMSNorm, RMSNorm] | None = None
        if shape.qk_norm:
            q_norm, k_norm = (RMSNorm(build, shape.head_dim, shape.eps, shape.norm_plus_one) for _ in range(2))
            self.qk_norms = q_norm, k_norm

    def prepare_codes(self, turns: Turns, find_basis: bool) -> None:
        """For a cache of codes, when the layer is loaded: the bias of the keys, where there is one, stays out of them.

        A norm between projection and rotation leaves no constant part of it, and takes away what needs one.

        Args:
            find_basis: the next call, which must be a prompt like all others, also chooses the axes of the keys.
        """
        shape, bias = self.shape, self.qkv.added
        if bias is not None and self.qk_norms is None:
            begin = shape.heads * shape.head_dim
            values = bias[begin : begin + shape.kv_heads * shape.head_dim].float().view(shape.kv_heads, shape.head_dim)
            self.offset = KeyOffset(values.to(turns.frequencies.device), turns)
        self._sampling = turns if find_basis else None

    def _find_basis(self, qkv: Tensor, turns: Turns) -> None:
        """Choose the axes by queries and keys ``qkv [n, all heads, D]``, at positions that are spread widely."""
        positions = torch.arange(len(qkv), dtype=torch.int32, device=qkv.device) * SPREAD
        rotation = self._rotation(turns.tables(positions))
        q, k, _ = rotation.split(qkv, self.shape.kv_heads)
        self.basis, self._sampling = KeyBasis.of(q, k), None

    def _rotation(self, tables: tuple[Tensor, Tensor]) -> Rotation:
        q_weight, k_weight = (None, None) if self.qk_norms is None else (norm.weight for norm in self.qk_norms)
        return Rotation(*tables, q_weight, k_weight, self.shape.eps, self.offset, self.basis)

    def __call__(self, x: Tensor | TokenCodes, tables: tuple[Tensor, Tensor], layer: KVLayer,
                 batch: ForwardBatch, rows: Tensor | None = None) -> Tensor:  # fmt: skip
        """``x [T, hidden]`` to ``[T, hidden]``, or to the results of the tokens ``rows`` alone; ``tables`` are the
        step's cosines and sines for this layer's rope."""
        shape = self.shape
        qkv = self.qkv(x)
        qkv = qkv.view(qkv.shape[0], shape.heads + 2 * shape.kv_heads, shape.head_dim)
        if self._sampling is not None:
            self._find_basis(qkv, self._sampling)
        rotation = self._rotation(tables)
        out = self.backend.run(qkv, rotation, layer, batch, shape.scale, shape.window)
        out = out.view(qkv.shape[0], -1)
        return self.o(out if rows is None else out[rows])
