"""DecoderSpec: an architecture as data."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Names:
    """Where a checkpoint keeps the parts of a decoder. The defaults are those of Llama.

    Attributes:
        roots: prefixes of the decoder body; the first that the checkpoint has is taken.
        packed_qkv: q, k and v in one tensor, whose rows are per key head: its query heads, its key, its value.
        attention_norm, mlp_norm: the norms before the two halves of a layer.
        attention_post_norm, mlp_post_norm: the norms after them, where the spec has such.
        ignore: patterns of tensors that a checkpoint may hold and this decoder does not need.
    """

    roots: tuple[str, ...] = ('model',)
    embedding: str = 'embed_tokens'
    layers: str = 'layers'
    final_norm: str = 'norm'
    heads: tuple[str, ...] = ('lm_head',)
    attention: str = 'self_attn'
    qkv: tuple[str, str, str] = ('q_proj', 'k_proj', 'v_proj')
    packed_qkv: str = ''
    o: str = 'o_proj'
    mlp: str = 'mlp'
    gate_up: tuple[str, str] = ('gate_proj', 'up_proj')
    down: str = 'down_proj'
    attention_norm: str = 'input_layernorm'
    attention_post_norm: str = ''
    mlp_norm: str = 'post_attention_layernorm'
    mlp_post_norm: str = ''
    ignore: tuple[str, ...] = (r'rotary_emb\.inv_freq$', r'\.attention\.masked_bias$', r'\.attn\.bias$')


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """What the one decoder needs to know beyond the sizes in ``config``.

    Attributes:
        config: sizes, biases, activation, ropes, windows.
        names: where the checkpoint keeps the tensors.
        qk_norm: queries and keys are normalised per head before rotation.
        norm_plus_one: norm weights are stored as their difference from 1.
        post_norms: the output of each half of a layer is normalised before it joins the residual stream.
        embedding_scale: factor of the embeddings.
    """

    config: ModelConfig
    names: Names = Names()
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
