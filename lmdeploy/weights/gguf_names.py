"""GGUF tensor names and layouts, translated to those of Hugging Face checkpoints.

Converters rename tensors and, for some architectures, rearrange them. Both are undone here, so that models see one
convention. ``llama`` and ``internlm2`` files have the rows of q and k permuted for interleaved rotation; ``gemma3``
files store norm weights with 1 added. Names that no table knows stay as they are and so end up among the leftovers.
"""

from __future__ import annotations

from dataclasses import dataclass

_COMMON = {
    'attn_norm': 'input_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_norm': 'post_attention_layernorm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}
_QK_NORM = {'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm'}
_GEMMA3 = {
    **_COMMON,
    **_QK_NORM,
    'post_attention_norm': 'post_attention_layernorm',
    'ffn_norm': 'pre_feedforward_layernorm',
    'post_ffw_norm': 'post_feedforward_layernorm',
}
_TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}


@dataclass(frozen=True, slots=True)
class GGUFArchitecture:
    """What is particular to the files of one ``general.architecture``.

    Attributes:
        hf_class: the Hugging Face class whose weights the translated tensors are.
        model_type: its ``model_type``.
        layer_names: names within a block (``blk.N.``) and their counterparts within ``model.layers.N.``.
        permuted_qk: q and k rows are stored for interleaved rotation.
        norm_shift: what converters added to norm weights.
    """

    hf_class: str
    model_type: str
    layer_names: dict[str, str]
    permuted_qk: bool = False
    norm_shift: float = 0.0


# InternLM2's converter splits the packed wqkv into q, k and v, which leaves a plain Llama
ARCHITECTURES: dict[str, GGUFArchitecture] = {
    'llama': GGUFArchitecture('LlamaForCausalLM', 'llama', _COMMON, permuted_qk=True),
    'internlm2': GGUFArchitecture('LlamaForCausalLM', 'llama', _COMMON, permuted_qk=True),
    'qwen2': GGUFArchitecture('Qwen2ForCausalLM', 'qwen2', _COMMON),
    'qwen3': GGUFArchitecture('Qwen3ForCausalLM', 'qwen3', {**_COMMON, **_QK_NORM}),
    'gemma3': GGUFArchitecture('Gemma3ForCausalLM', 'gemma3_text', _GEMMA3, norm_shift=1.0),
}


def hf_name(name: str, arch: GGUFArchitecture) -> str:
    """``'blk.3.attn_q.weight'`` -> ``'model.layers.3.self_attn.q_proj.weight'``; unknown names come back unchanged."""
    stem, dot, kind = name.rpartition('.')
    if not dot or kind not in ('weight', 'bias'):
        return name
    if stem in _TOP:
        return f'{_TOP[stem]}.{kind}'
    parts = stem.split('.')
    if len(parts) == 3 and parts[0] == 'blk' and parts[1].isdecimal() and parts[2] in arch.layer_names:
        return f'model.layers.{parts[1]}.{arch.layer_names[parts[2]]}.{kind}'
    return name
