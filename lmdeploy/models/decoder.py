"""The decoder: one pre-norm transformer for every architecture that a DecoderSpec describes.

Life: built from spec and Build, then :meth:`Decoder.load` once, then any number of calls. It keeps no state between
calls: everything about a step comes in the batch, everything about the past lies in the cache.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionCase, choose
from lmdeploy.config.model import SLIDING
from lmdeploy.kv.cache import PAGE, KVCache, KVLayer, KVShape
from lmdeploy.models.spec import DecoderSpec, Names
from lmdeploy.nn.attention import Attention, AttentionShape
from lmdeploy.nn.build import Build
from lmdeploy.nn.embedding import Embedding, LMHead
from lmdeploy.nn.linear import read_bundle
from lmdeploy.nn.mlp import GatedMLP
from lmdeploy.nn.norm import RMSNorm
from lmdeploy.nn.rotary import Rotary
from lmdeploy.ops.kv_codes import Turns
from lmdeploy.parallel.heads import share_heads
from lmdeploy.quant.rows import take_outputs
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.weights.checkpoint import Prefix

SAMPLE = 256  # random tokens by which the axes of keys are chosen
LARGEST_BASIS = 128  # channels of a head; what a GPU multiplies in one piece


class DecoderLayer:
    """Attention and MLP, each between a norm and the residual stream.

    What the MLP gives is added to the stream by the norm that follows it, which is the next layer's: one operation per
    norm. ``mlp_post_norm``, where there is one, is left to it as well.
    """

    def __init__(self, build: Build, spec: DecoderSpec, attention: Attention) -> None:
        config = spec.config
        self.attention = attention
        self.mlp = GatedMLP(build, config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias)

        def norm() -> RMSNorm:
            return RMSNorm(build, config.hidden_size, config.rms_norm_eps, spec.norm_plus_one)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention_post_norm = norm() if spec.post_norms else None
        self.mlp_post_norm = norm() if spec.post_norms else None

    def __call__(self, x: Tensor, residual: Tensor | None, post: RMSNorm | None, tables: tuple[Tensor, Tensor],
                 kv: KVLayer, batch: ForwardBatch, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``x``, normalised by ``post``, is what the layer before adds to ``residual`` (None: x is the stream).

        ``rows [R] int64``: the tokens whose results are wanted; the others only leave their keys and values.
        """
        normal, residual = self.attention_norm.for_layer(self.attention.qkv.takes, x, residual, post)
        x = self.attention(normal, tables, kv, batch, rows)
        if rows is not None:
            residual = residual[rows]
        normal, residual = self.mlp_norm.for_layer(self.mlp.gate_up.takes, x, residual, self.attention_post_norm)
        return self.mlp(normal), residual

    def check(self, prefix: Prefix, names: Names) -> None:
        """Refuse from headers alone linear layers that :meth:`load` cannot read."""
        attention, mlp = prefix.child(names.attention), prefix.child(names.mlp)
        packed = (names.packed_qkv,) if names.packed_qkv else names.qkv
        self.attention.qkv.check(*(attention.child(name) for name in packed))
        self.attention.o.check(attention.child(names.o))
        self.mlp.gate_up.check(*(mlp.child(name) for name in names.gate_up))
        self.mlp.down.check(mlp.child(names.down))

    def load(self, prefix: Prefix, names: Names) -> None:
        attention, mlp = prefix.child(names.attention), prefix.child(names.mlp)
        if names.packed_qkv:
            load_packed_qkv(self.attention, attention.child(names.packed_qkv))
        else:
            self.attention.qkv.load(*(attention.child(name) for name in names.qkv))
        self.attention.o.load(attention.child(names.o))
        if self.attention.qk_norms is not None:
            for norm, name in zip(self.attention.qk_norms, ('q_norm', 'k_norm')):
                norm.load(attention.child(name))
        self.mlp.gate_up.load(*(mlp.child(name) for name in names.gate_up))
        self.mlp.down.load(mlp.child(names.down))
        self.attention_norm.load(prefix.child(names.attention_norm))
        self.mlp_norm.load(prefix.child(names.mlp_norm))
        if self.attention_post_norm is not None and self.mlp_post_norm is not None:
            self.attention_post_norm.load(prefix.child(names.attention_post_norm))
            self.mlp_post_norm.load(prefix.child(names.mlp_post_norm))


class Decoder:
    """A causal language model; see the module."""

    def __init__(self, spec: DecoderSpec, build: Build) -> None:
        config = spec.config
        self.spec, self.config, self.build = spec, config, build
        own = share_heads(config.num_heads, config.num_kv_heads, build.group.rank, build.group.size)
        self.kv_shape = KVShape(config.num_layers, len(own.keys), config.head_dim, build.kv_bits)
        windows = [config.sliding_window if kind == SLIDING else 0 for kind in config.layer_types]
        self.case = AttentionCase(len(own.queries), len(own.keys), config.head_dim, tuple(sorted(set(windows))),
                                  build.kv_bits)  # fmt: skip
        self.attention = choose(build.device, build.dtype, self.case)
        ropes = [config.local_rope if kind == SLIDING else config.rope for kind in config.layer_types]
        distinct = list(dict.fromkeys(ropes))
        self.ropes = [Rotary(rope, build.device) for rope in distinct]
        self.layer_ropes = [distinct.index(rope) for rope in ropes]
        self.embedding = Embedding(build, config.vocab_size, config.hidden_size, spec.embedding_scale)
        self.layers = [DecoderLayer(build, spec, self._attention(window)) for window in windows]
        self.norm = RMSNorm(build, config.hidden_size, config.rms_norm_eps, spec.norm_plus_one)
        self.head = LMHead(build, config.vocab_size, config.hidden_size)

    def load(self, prefix: Prefix) -> None:
        """Pull every tensor from the checkpoint whose top is ``prefix``.

        Raises:
            LoadError: LMD-132, LMD-133: a tensor is missing or has the wrong shape; LMD-140 to LMD-142: a layer is
                quantised in another way than it should be, which is told before any tensor is read. The caller asks
                the checkpoint for leftovers, see :attr:`ignore`.
        """
        names = self.spec.names
        body = prefix.child(next((root for root in names.roots if prefix.has(root)), names.roots[0]))
        for i, layer in enumerate(self.layers):
            layer.check(body.child(f'{names.layers}.{i}'), names)
        head = prefix.child(next((head for head in names.heads if prefix.has(head)), names.heads[0]))
        if not self.config.tie_word_embeddings:
            self.head.check(head)
        self.embedding.load(body.child(names.embedding))
        for i, layer in enumerate(self.layers):
            layer.load(body.child(f'{names.layers}.{i}'), names)
        self.norm.load(body.child(names.final_norm))
        if self.config.tie_word_embeddings:
            self.head.tie(self.embedding)
        else:
            self.head.load(head)
        self._prepare_codes()

    @property
    def ignore(self) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold and this model does not need; for ``Checkpoint.finish``."""
        names = self.spec.names
        tied = tuple(rf'^{re.escape(head)}\.' for head in names.heads) if self.config.tie_word_embeddings else ()
        scales = (r'\.[kv]_scale$',) if self.config.quantization is not None else ()  # of a KV cache
        return names.ignore + tied + scales

    @property
    def static(self) -> bool:
        """Whether it serves static batches, so that graphs can be recorded."""
        return self.attention.static

    def prepare(self, batch: ForwardBatch, kv: KVCache) -> None:
        """Put the attention backend's data for this step into the batch, if it is not there yet."""
        if batch.plan is None:
            batch.plan = self.attention.prepare(self.case, batch, kv)

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Write the step's keys and values into ``kv`` and return the hidden states, normalised, of the tokens
        ``batch.output_rows``: ``[R, hidden]``. The last layer computes no others."""
        self.prepare(batch, kv)
        tables = [rotary(batch.positions) for rotary in self.ropes]
        x, residual, post = self.embedding(batch.token_ids), None, None
        if batch.embeds is not None:
            x = x.index_copy(0, batch.embeds.rows, batch.embeds.values)
        rows = None if batch.every_row else batch.output_rows
        none = rows is not None and not rows.shape[0]
        if none:  # kernels are not made for no tokens
            rows = batch.output_rows.new_zeros(1)
        for i, layer in enumerate(self.layers):
            wanted = rows if i == len(self.layers) - 1 else None
            x, residual = layer(x, residual, post, tables[self.layer_ropes[i]], kv.layer(i), batch, wanted)
            post = layer.mlp_post_norm
        assert residual is not None  # there is a layer
        hidden = self.norm.add(x, residual, post)[0]
        return hidden[:0] if none else hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` to ``[R, vocab] float32``."""
        return self.head(hidden)

    def choices(self) -> dict[str, str]:
        """What was chosen for this device, for the start line; after :meth:`load`."""
        kernel = self.layers[0].mlp.down.kernel
        return {'attention': self.attention.name, 'linear': kernel.name if kernel is not None else ''}

    def _prepare_codes(self) -> None:
        """Where the cache holds codes: what keys have in common stays out of them, and codes of 4 bits get their axes.

        Not where positions may have several rows: a score is corrected by the key's place in the cache alone. Axes are
        found from a text of random tokens, and so the same ones at every start.
        """
        config, build = self.config, self.build
        if not build.kv_bits or any(rope.sections for rope in self.ropes):
            return
        turns = [Turns(rope.frequencies, rope.factor) for rope in self.ropes]
        find = build.kv_bits == 4 and config.head_dim <= LARGEST_BASIS
        for layer, rope in zip(self.layers, self.layer_ropes):
            layer.attention.prepare_codes(turns[rope], find)
        self.case = replace(self.case, offset=any(layer.attention.offset is not None for layer in self.layers))
        if find:
            self(random_batch(config.vocab_size, build.device), KVCache(self.kv_shape, -(-SAMPLE // PAGE), PAGE,
                                                                        build.dtype, build.device))  # fmt: skip

    def _attention(self, window: int) -> Attention:
        spec, config = self.spec, self.config
        shape = AttentionShape(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            scale=config.attention_scalar**-0.5, window=window, qkv_bias=config.qkv_bias, o_bias=config.o_bias,
            qk_norm=spec.qk_norm, norm_plus_one=spec.norm_plus_one, eps=config.rms_norm_eps,
        )  # fmt: skip
        return Attention(self.build, shape, self.attention)


def random_batch(vocab_size: int, device: torch.device) -> ForwardBatch:
    """A prompt of SAMPLE tokens, always the same ones, in the blocks from 1 on; its last token gives logits."""
    ids = torch.randint(vocab_size, (SAMPLE,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    positions = torch.arange(SAMPLE, dtype=torch.int32, device=device)
    last = torch.tensor([SAMPLE], dtype=torch.int32, device=device)
    return ForwardBatch(
        ids.to(device), positions, positions.long() + PAGE, torch.tensor([0, SAMPLE], dtype=torch.int32, device=device),
        last, torch.arange(1, -(-SAMPLE // PAGE) + 1, dtype=torch.int32, device=device)[None], last.long() - 1, SAMPLE,
        SAMPLE, [0, SAMPLE], [SAMPLE])  # fmt: skip


def load_packed_qkv(attention: Attention, prefix: Prefix) -> None:
    """Load q, k and v from one tensor whose rows are grouped by key head: its query heads, its key, its value."""
    shape, linear = attention.whole, attention.qkv
    bundle = read_bundle(linear.build, prefix, linear.in_features, sum(linear.out_features), linear.bias)
    group = shape.heads // shape.kv_heads
    rows = torch.arange(bundle.out_features).view(shape.kv_heads, group + 2, shape.head_dim)
    index = torch.cat((rows[:, :group].flatten(), rows[:, group].flatten(), rows[:, group + 1].flatten()))
    linear.set(take_outputs(bundle, index))
