"""The same function in other numbers: channels and heads in another order, which changes nothing but rounding.

A model that was quantised before lies on the grid of that format, and would look perfect to a tool that uses the same
one. In another order of its channels it lies on nobody's grid: residual channels, MLP channels, key heads with their
query heads, the query heads of one key head, and the value channels within a head all change places. Channels of
queries and keys within a head do not: rotary embeddings bind them in pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.lite.recipe import LayerWeights, TopWeights


def order(size: int, seed: int) -> Tensor:
    """``[size] int64``"""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def permute_top(top: TopWeights, seed: int) -> None:
    stream = order(top.embedding.shape[1], seed).to(top.embedding.device)
    top.embedding, top.head, top.norm = top.embedding[:, stream], top.head[:, stream], top.norm[stream]


def permute_layer(layer: LayerWeights, seed: int) -> None:
    """Every layer has an order of its own but for the stream's, which all share."""
    hidden, inner = layer.linears['gate'].weight.shape[1], layer.linears['gate'].weight.shape[0]
    dim, group = layer.head_dim, layer.heads // layer.kv_heads
    own = seed * 1000 + 7 * layer.index
    stream, channels = order(hidden, seed), order(inner, own + 1)
    keys = order(layer.kv_heads, own + 2)
    queries = torch.cat([key * group + order(group, own + 3 + int(key) * 100) for key in keys])
    values = torch.cat([order(dim, own + 50_000 + int(key)) + key * dim for key in keys])

    def rows(heads: Tensor) -> Tensor:
        return (heads[:, None] * dim + torch.arange(dim)).flatten()

    # each query head's columns of o are in the order of the values of the key head that it reads
    columns = torch.cat([values.view(-1, dim)[i // group] % dim + query * dim for i, query in enumerate(queries)])
    picked = {'q': (rows(queries), stream), 'k': (rows(keys), stream), 'v': (values, stream), 'o': (stream, columns),
              'gate': (channels, stream), 'up': (channels, stream), 'down': (stream, channels)}  # fmt: skip
    for role, (out, into) in picked.items():
        linear = layer.linears[role]
        device = linear.weight.device
        linear.weight = linear.weight[out.to(device)][:, into.to(device)]
        if linear.bias is not None:
            linear.bias = linear.bias[out.to(device)]
    for name in ('attention', 'mlp', 'attention_post', 'mlp_post'):
        if name in layer.norms:
            layer.norms[name] = layer.norms[name][stream.to(layer.norms[name].device)]
