"""The names and shapes of all tensors that a decoder pulls from a checkpoint, told by its spec alone."""

from __future__ import annotations

from lmdeploy.models.spec import DecoderSpec

Shape = tuple[int, ...]


def tensor_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """``{'model.layers.0.mlp.down_proj.weight': (hidden, intermediate), ...}``, dense and not split."""
    config, names = spec.config, spec.names
    hidden, root = config.hidden_size, names.roots[-1]
    shapes: dict[str, Shape] = {f'{root}.{names.embedding}.weight': (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        for name, shape in _layer(spec).items():
            shapes[f'{root}.{names.layers}.{layer}.{name}'] = shape
    shapes[f'{root}.{names.final_norm}.weight'] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[f'{names.heads[0]}.weight'] = (config.vocab_size, hidden)
    return shapes


def _layer(spec: DecoderSpec) -> dict[str, Shape]:
    config, names = spec.config, spec.names
    hidden, dim, inner = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    qkv = {names.packed_qkv: q + 2 * kv} if names.packed_qkv else dict(zip(names.qkv, (q, kv, kv)))
    shapes: dict[str, Shape] = {}

    def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
        shapes[f'{name}.weight'] = (out_features, in_features)
        if bias:
            shapes[f'{name}.bias'] = (out_features,)

    for name, width in qkv.items():
        linear(f'{names.attention}.{name}', width, hidden, config.qkv_bias)
    linear(f'{names.attention}.{names.o}', hidden, q, config.o_bias)
    for name in names.gate_up:
        linear(f'{names.mlp}.{name}', inner, hidden, config.mlp_bias)
    linear(f'{names.mlp}.{names.down}', hidden, inner, config.mlp_bias)
    norms = [names.attention_norm, names.mlp_norm]
    if spec.post_norms:
        norms += [names.attention_post_norm, names.mlp_post_norm]
    shapes.update({f'{name}.weight': (hidden,) for name in norms})
    if spec.qk_norm:
        shapes.update({f'{names.attention}.{name}.weight': (dim,) for name in ('q_norm', 'k_norm')})
    return shapes
