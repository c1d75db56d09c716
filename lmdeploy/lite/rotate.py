"""Rotations that are folded into the weights: the model computes the same, and its weights are easier to round.

R1 turns the residual stream: the embedding and the outputs of o and down are multiplied by an orthogonal matrix, and
whatever reads the stream by its transpose; norms between them only divide by a length, which a rotation keeps, once
their weights are folded into what reads them. R2 turns the values within each key head: the rows of v, and the columns
of o for all the query heads that share it.

Source: Ashkboos et al., QuaRot (arXiv 2404.00456), where the matrices are random Hadamard matrices.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lmdeploy.lite.recipe import LayerWeights, TopWeights
from lmdeploy.ops.hadamard import matrix

SEED = 20240401
R2_SEED = SEED + 1
WIDEST = 4096  # of a Hadamard factor that is kept as a matrix


@lru_cache(maxsize=4)
def orthogonal(size: int, seed: int) -> Tensor:
    """``[size, size] float32``: random signs, then the product of a Hadamard matrix with a random rotation.

    ``size = m 2^k``, m odd: the Hadamard matrix has ``2^k`` rows and the rotation m, so every entry has about the same
    magnitude. The same seed gives the same matrix on every machine.
    """
    power = size & -size
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=random).mul_(2).sub_(1).double()
    odd = _rotation(size // power, random)
    cpu = torch.device('cpu')
    low = min(power, WIDEST)
    even = torch.kron(matrix(power // low, cpu).double(), matrix(low, cpu).double())
    return (signs[:, None] * torch.kron(odd, even)).float()


def _rotation(size: int, random: torch.Generator) -> Tensor:
    """A random orthogonal matrix ``[size, size] float64``, by Householder reflections of random directions."""
    made = torch.eye(size, dtype=torch.float64)
    for _ in range(size if size > 1 else 0):
        direction = torch.randn(size, generator=random, dtype=torch.float64)
        direction /= direction.norm()
        made -= 2 * torch.outer(made @ direction, direction)
    return made


def rotate_top(top: TopWeights, r1: Tensor) -> None:
    """Turn what lies outside of the layers; embedding and head are two tensors afterwards.

    Args:
        r1: ``[hidden, hidden]``: the stream x becomes ``x r1``.
    """
    r1 = r1.to(top.embedding.device)
    top.head = (top.head * top.norm) @ r1
    top.embedding = top.embedding @ r1
    top.norm = torch.ones_like(top.norm)
    top.tied = False


def rotate_stream(layer: LayerWeights, r1: Tensor) -> None:
    """Turn what a layer reads from the stream and what it adds to it; the norms in front become ones.

    Raises:
        ValueError: outputs are normalised before they join the stream, with weights that no rotation passes.
    """
    if 'attention_post' in layer.norms or 'mlp_post' in layer.norms:
        raise ValueError('norms behind attention and MLP do not let a rotation of the stream through')
    r1 = r1.to(layer.norms['mlp'].device)
    for role in ('q', 'k', 'v', 'gate', 'up'):
        linear = layer.linears[role]
        linear.weight = (linear.weight * layer.norms['attention' if role in 'qkv' else 'mlp']) @ r1
    for role in ('o', 'down'):
        linear = layer.linears[role]
        linear.weight = r1.t() @ linear.weight
        if linear.bias is not None:
            linear.bias = linear.bias @ r1
    for name in ('attention', 'mlp'):
        layer.norms[name] = torch.ones_like(layer.norms[name])


def rotate_values(layer: LayerWeights, r2: Tensor) -> None:
    """Turn the values of every key head.

    Args:
        r2: ``[head_dim, head_dim]``: values v become ``v r2``.
    """
    v, o = layer.linears['v'], layer.linears['o']
    r2 = r2.to(v.weight.device)
    v.weight = (r2.t() @ v.weight.unflatten(0, (layer.kv_heads, layer.head_dim))).flatten(0, 1)
    if v.bias is not None:
        v.bias = (v.bias.unflatten(0, (layer.kv_heads, layer.head_dim)) @ r2).flatten()
    o.weight = (o.weight.unflatten(1, (layer.heads, layer.head_dim)) @ r2).flatten(1)
