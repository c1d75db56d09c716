"""ViT: the towers that read square tiles: InternViT, CLIP's and SigLIP's, told apart by a config and names.

A tile is cut into patches, each becomes a vector by one linear layer, and pre-norm transformer layers let all patches
of a tile see each other (Dosovitskiy et al., 2020). InternViT scales what its layers add to the stream, and its largest
one normalises queries and keys (Chen et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.vision import TowerConfig
from lmdeploy.errors import LoadError
from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear, read_bundle
from lmdeploy.nn.mlp import MLP
from lmdeploy.nn.norm import LayerNorm, RMSNorm
from lmdeploy.parallel.heads import channels, share_heads
from lmdeploy.parallel.split import Split
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Prefix


@dataclass(frozen=True, slots=True)
class TowerNames:
    """Where a checkpoint keeps the parts of a tower. The defaults are CLIP's.

    Attributes:
        qkv: one name where the three lie in one tensor.
        scales: factors of what the two halves of a layer add; empty: there are none.
        class_token: ``''``: there is none.
        pre_norm: of what goes into the first layer; ``''``: there is none.
    """

    patches: str = 'embeddings.patch_embedding'
    positions: str = 'embeddings.position_embedding.weight'
    class_token: str = 'embeddings.class_embedding'
    pre_norm: str = 'pre_layrnorm'
    layers: str = 'encoder.layers'
    qkv: tuple[str, ...] = ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')
    qk_norms: tuple[str, str] = ('', '')
    o: str = 'self_attn.out_proj'
    mlp: tuple[str, str] = ('mlp.fc1', 'mlp.fc2')
    norms: tuple[str, str] = ('layer_norm1', 'layer_norm2')
    scales: tuple[str, ...] = ()


CLIP = TowerNames()
SIGLIP = TowerNames(class_token='', pre_norm='')
INTERN = TowerNames(
    positions='embeddings.position_embedding', pre_norm='', qkv=('attn.qkv',), qk_norms=('attn.q_norm', 'attn.k_norm'),
    o='attn.proj', norms=('norm1', 'norm2'), scales=('ls1', 'ls2'),
)  # fmt: skip
INTERN_HF = TowerNames(
    'embeddings.patch_embeddings.projection', 'embeddings.position_embeddings', 'embeddings.cls_token', '',
    'encoder.layer', ('attention.q_proj', 'attention.k_proj', 'attention.v_proj'),
    ('attention.q_norm', 'attention.k_norm'), 'attention.projection_layer',
    norms=('layernorm_before', 'layernorm_after'), scales=('lambda_1', 'lambda_2'),
)  # fmt: skip


class Layer:
    """Attention over a tile and an MLP, each between a norm and the residual stream."""

    def __init__(self, tower: TowerConfig, names: TowerNames, build: Build) -> None:
        hidden = tower.hidden_size
        self.names = names
        self.heads, self.qkv, self.o = attention_linears(tower, build)
        self.mlp = MLP(build, hidden, tower.intermediate_size, tower.activation)
        self.norms = tuple(norm(tower, build) for _ in range(2))
        self.qk_norms = tuple(RMSNorm(build, hidden, tower.norm_eps) for _ in range(2)) if tower.qk_norm else ()
        self.scales: tuple[Tensor, ...] = ()

    def load(self, prefix: Prefix) -> None:
        names, linear = self.names, self.qkv
        if len(names.qkv) == 1:
            width = sum(linear.out_features)
            linear.set(read_bundle(linear.build, prefix.child(names.qkv[0]), linear.in_features, width, linear.bias))
        else:
            linear.load(*(prefix.child(name) for name in names.qkv))
        self.o.load(prefix.child(names.o))
        self.mlp.load(*(prefix.child(name) for name in names.mlp))
        for part, name in zip((*self.norms, *self.qk_norms), (*names.norms, *names.qk_norms)):
            part.load(prefix.child(name))
        self.scales = tuple(vector(prefix, name, linear.in_features, linear.build) for name in names.scales)

    def __call__(self, x: Tensor, added: Tensor | None, scale: Tensor | None, tiles: int) -> tuple[Tensor, Tensor]:
        """From the stream ``x [tiles * positions, hidden]``, to which the layer before adds ``added * scale`` (None:
        nothing), to the same stream and what this layer adds to it, times :attr:`scale`."""
        x, normed = add_norm(self.norms[0], x, added, scale)
        added = self.o(self._attend(self.qkv(normed), tiles))
        x, normed = add_norm(self.norms[1], x, added, self.scales[0] if self.scales else None)
        return x, self.mlp(normed)

    @property
    def scale(self) -> Tensor | None:
        """Of what the layer gives."""
        return self.scales[1] if self.scales else None

    def _attend(self, qkv: Tensor, tiles: int) -> Tensor:
        """``[tiles * positions, 3 * hidden]`` to ``[tiles * positions, hidden]``."""
        parts = list(qkv.chunk(3, -1))
        for i, qk_norm in enumerate(self.qk_norms):
            parts[i] = qk_norm(parts[i])
        q, k, v = (part.view(tiles, -1, self.heads, part.shape[-1] // self.heads).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(qkv.shape[0], -1)


def attention_linears(tower: TowerConfig, build: Build) -> tuple[int, Linear, Linear]:
    """This rank's number of heads, and the linear layers before and behind them.

    A norm over all heads together needs them all: then every rank computes the whole attention.
    """
    hidden, size = tower.hidden_size, 1 if tower.qk_norm else build.group.size
    dim = hidden // tower.num_heads
    heads = [share_heads(tower.num_heads, tower.num_heads, rank, size) for rank in range(size)]
    queries = [channels(one.queries, dim) for one in heads]
    keys = [channels(one.keys, dim) for one in heads]
    parts = [torch.cat((own, hidden + key, 2 * hidden + key)) for own, key in zip(queries, keys)]
    qkv = Linear(build, hidden, (hidden,) * 3, tower.qkv_bias, Split.OUT, parts if size > 1 else None)
    o = Linear(build, hidden, (hidden,), True, Split.IN, queries if size > 1 else None)
    return len(heads[build.group.rank if size > 1 else 0].queries), qkv, o


class ViT:
    """A tower; see the module.

    Args:
        layers: how many are run: the features may be those of an earlier layer than the last.
    """

    def __init__(self, tower: TowerConfig, names: TowerNames, layers: int, build: Build) -> None:
        self.tower, self.names, self.build = tower, names, build
        self.patches = Linear(build, 3 * tower.patch_size**2, (tower.hidden_size,))
        self.pre_norm = norm(tower, build) if names.pre_norm else None
        self.layers = [Layer(tower, names, build) for _ in range(layers)]
        self.positions: Tensor  # [positions, hidden], the class token's with itself

    def load(self, prefix: Prefix) -> None:
        """Pull the weights.

        Raises:
            LoadError: a tensor is missing or has the wrong shape.
        """
        tower, names, build = self.tower, self.names, self.build
        self.patches.set(patch_bundle(prefix.child(names.patches), tower, build))
        per_side = tower.image_size // tower.patch_size
        shape = (per_side**2 + bool(names.class_token), tower.hidden_size)
        # the class token and its position are one vector, rounded once
        positions = flat(prefix, names.positions, shape, torch.float32)
        if names.class_token:
            positions[0] += flat(prefix, names.class_token, (1, tower.hidden_size), torch.float32)[0]
        self.positions = positions.to(build.dtype).to(build.device)
        if self.pre_norm is not None:
            self.pre_norm.load(prefix.child(names.pre_norm))
        for i, layer in enumerate(self.layers):
            layer.load(prefix.child(f'{names.layers}.{i}'))

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The tensors that :meth:`load` pulls."""
        tower, names, hidden = self.tower, self.names, self.tower.hidden_size
        inner, side = tower.intermediate_size, tower.image_size // tower.patch_size
        shapes: dict[str, tuple[int, ...]] = {
            f'{names.patches}.weight': (hidden, 3, tower.patch_size, tower.patch_size),
            names.positions: (side**2 + bool(names.class_token), hidden)}
        if names.class_token:
            shapes[names.class_token] = (hidden,)
        if names is not CLIP:
            shapes[f'{names.patches}.bias'] = (hidden,)
        vectors = ('weight',) if tower.rms_norm else ('weight', 'bias')
        shapes |= {f'{names.pre_norm}.{part}': (hidden,) for part in vectors if names.pre_norm}
        for i in range(len(self.layers)):
            at = f'{names.layers}.{i}.'
            width = 3 * hidden // len(names.qkv)
            for name in names.qkv:
                shapes[f'{at}{name}.weight'] = (width, hidden)
                if tower.qkv_bias:
                    shapes[f'{at}{name}.bias'] = (width,)
            for name, (out, into) in zip((names.o, *names.mlp), ((hidden, hidden), (inner, hidden), (hidden, inner))):
                shapes |= {f'{at}{name}.weight': (out, into), f'{at}{name}.bias': (out,)}
            shapes |= {f'{at}{name}.{part}': (hidden,) for name in names.norms for part in vectors}
            shapes |= {f'{at}{name}.weight': (hidden,) for name in names.qk_norms if tower.qk_norm}
            shapes |= {f'{at}{name}': (hidden,) for name in names.scales}
        return {f'{prefix}.{name}': shape for name, shape in shapes.items()}

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[tiles, 3, H, W]`` to the stream after the last layer that is run, ``[tiles, positions, hidden]``."""
        tiles, hidden = pixels.shape[0], self.tower.hidden_size
        x = self.patches(to_patches(pixels, self.tower.patch_size)).view(tiles, -1, hidden)
        first = len(self.positions) - x.shape[1]
        x = torch.cat((self.positions[:first].expand(tiles, -1, -1), x + self.positions[first:]), 1)
        x = x.reshape(-1, hidden)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        added = scale = None
        for layer in self.layers:
            x, added = layer(x, added, scale, tiles)
            scale = layer.scale
        return add(x, added, scale).view(tiles, -1, hidden)


def norm(tower: TowerConfig, build: Build) -> LayerNorm | RMSNorm:
    """A norm of the tower's kind."""
    return (RMSNorm if tower.rms_norm else LayerNorm)(build, tower.hidden_size, tower.norm_eps)


def add(x: Tensor, added: Tensor | None, scale: Tensor | None) -> Tensor:
    """``x + added * scale``."""
    if added is None:
        return x
    return x + added if scale is None else torch.addcmul(x, added, scale)


def add_norm(part: LayerNorm | RMSNorm, x: Tensor, added: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``s = x + added * scale``, and its norm."""
    if added is None:
        return x, part(x)
    if isinstance(part, LayerNorm):
        normed, total = part.add(added, x, scale)
    elif scale is None:
        normed, total = part.add(added, x)
    else:
        total = torch.addcmul(x, added, scale)
        normed = part(total)
    return total, normed


def to_patches(pixels: Tensor, side: int) -> Tensor:
    """``[tiles, 3, H, W]`` to ``[tiles * patches, 3 * side * side]``, row by row; what is left at the edges is cut."""
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    pixels = pixels[:, :, : rows * side, : columns * side]
    return pixels.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5).reshape(
        -1, 3 * side**2)


def patch_bundle(prefix: Prefix, tower: TowerConfig, build: Build) -> LinearBundle:
    """The convolution that makes patches into vectors, as a linear layer over a patch's values.

    A kernel that spans several frames is summed over them: a picture is the same in all.
    """
    hidden, side = tower.hidden_size, tower.patch_size
    if tower.frames > 1:
        weight = prefix.get('weight', (hidden, 3, tower.frames, side, side), torch.float32).sum(2)
    else:
        weight = prefix.get('weight', (hidden, 3, side, side), torch.float32)
    bias = vector(prefix, 'bias', hidden, build) if prefix.has('bias') else None
    weight = weight.reshape(hidden, -1).to(build.dtype).to(build.device)
    return LinearBundle(dense_scheme(weight.element_size() * 8), hidden, weight.shape[1], weight=weight, bias=bias)


def vector(prefix: Prefix, name: str, size: int, build: Build) -> Tensor:
    """``[size]`` of the engine's type, on its device."""
    return prefix.get(name, (size,), build.dtype).to(build.device)


def flat(prefix: Prefix, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that checkpoints store with more or fewer sizes of 1.

    Raises:
        LoadError: LMD-133: it has another number of values.
    """
    tensor = prefix.get(name, None, dtype)
    if tensor.numel() != prod(shape):
        raise LoadError('LMD-133', tensor=f'{prefix.path}.{name}', file=prefix.checkpoint.path,
                        found=list(tensor.shape), wanted=list(shape))
    return tensor.reshape(shape)
