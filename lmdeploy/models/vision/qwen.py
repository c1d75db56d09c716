"""The tower of Qwen2-VL and Qwen2.5-VL: pictures in their own shape, with rotary positions in two directions.

A picture's patches lie block by block: those of one block become one token of the decoder. Qwen2-VL's layers see the
whole picture (Wang et al., 2024); most of Qwen2.5-VL's see a window of it (Bai et al., 2025). Pictures of one call lie
one after the other, without padding; only windows are looked at as a padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.rope import RopeConfig
from lmdeploy.config.vision import TowerConfig
from lmdeploy.models.vision.vit import add, add_norm, attention_linears, norm, patch_bundle
from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear, read_bundle
from lmdeploy.nn.mlp import MLP, GatedMLP
from lmdeploy.nn.rotary import inverse_frequencies
from lmdeploy.ops.rope import rope
from lmdeploy.weights.checkpoint import Prefix

THETA = 10000.0


@dataclass(frozen=True, slots=True)
class Windows:
    """Segments of a sequence of T patches, W of them with at most L, in any order.

    Attributes:
        pad: ``[W, L] int64``, the patch at each place of a segment; behind its end, any.
        there: ``[W, L] bool``, whether it is one of the segment; None: all have L patches.
        back: ``[T] int64``, each patch's place in the flattened ``pad``.
    """

    pad: Tensor
    there: Tensor | None
    back: Tensor

    @staticmethod
    def of(segment: Tensor, device: torch.device) -> Windows:
        """Of ``segment [T] int64``, the number of each patch's segment, on the host."""
        order = torch.argsort(segment, stable=True)
        sizes = torch.bincount(segment)
        sizes = sizes[sizes > 0]
        starts = sizes.cumsum(0) - sizes
        places = torch.arange(int(sizes.max()))
        there = places < sizes[:, None]
        pad = order[starts[:, None] + torch.minimum(places, sizes[:, None] - 1)]
        back = torch.empty_like(order)
        back[order] = there.flatten().nonzero()[:, 0]
        return Windows(pad.to(device), None if bool(there.all()) else there.to(device), back.to(device))


@dataclass(frozen=True, slots=True)
class Patches:
    """The pictures of one call.

    Attributes:
        counts: patches of each picture.
        tables: cosines and sines, see :func:`lmdeploy.ops.rope.rope`.
        windows: of the layers that see a window; None: there are no such layers.
    """

    counts: list[int]
    tables: tuple[Tensor, Tensor]
    windows: Windows | None


class Layer:
    """Attention over a picture or a window, and an MLP, each between a norm and the residual stream."""

    def __init__(self, tower: TowerConfig, build: Build) -> None:
        hidden, inner = tower.hidden_size, tower.intermediate_size
        self.heads, self.qkv, self.o = attention_linears(tower, build)
        self.mlp = GatedMLP(build, hidden, inner, tower.activation, True) if tower.kind == 'qwen2_5' else MLP(
            build, hidden, inner, tower.activation)
        self.norms = norm(tower, build), norm(tower, build)

    def load(self, prefix: Prefix) -> None:
        linear, mlp = self.qkv, prefix.child('mlp')
        linear.set(read_bundle(linear.build, prefix.child('attn.qkv'), linear.in_features, sum(linear.out_features),
                               True))
        self.o.load(prefix.child('attn.proj'))
        if isinstance(self.mlp, GatedMLP):
            self.mlp.gate_up.load(mlp.child('gate_proj'), mlp.child('up_proj'))
            self.mlp.down.load(mlp.child('down_proj'))
        else:
            self.mlp.load(mlp.child('fc1'), mlp.child('fc2'))
        for part, name in zip(self.norms, ('norm1', 'norm2')):
            part.load(prefix.child(name))

    def __call__(self, x: Tensor, added: Tensor | None, patches: Patches, windowed: bool) -> tuple[Tensor, Tensor]:
        """From the stream ``x [T, hidden]``, to which the layer before adds ``added`` (None: nothing), to the same
        stream and what this layer adds to it."""
        x, normed = add_norm(self.norms[0], x, added, None)
        qkv = self.qkv(normed).view(len(x), 3 * self.heads, -1)
        qk, v = qkv[:, : 2 * self.heads], qkv[:, 2 * self.heads :]
        qk = rope(qk, *patches.tables).to(x.dtype)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        attend = _in_windows if windowed and patches.windows is not None else _in_pictures
        x, normed = add_norm(self.norms[1], x, self.o(attend(q, k, v, patches).flatten(1)), None)
        return x, self.mlp(normed)


class QwenTower:
    """A tower; see the module."""

    def __init__(self, tower: TowerConfig, build: Build) -> None:
        self.tower, self.build = tower, build
        self.patches = Linear(build, 3 * tower.patch_size**2, (tower.hidden_size,))
        self.layers = [Layer(tower, build) for _ in range(tower.num_layers)]
        half = tower.hidden_size // tower.num_heads // 2
        self.frequencies = inverse_frequencies(RopeConfig(theta=THETA, rotary_dim=half))[0].to(build.device)

    def load(self, prefix: Prefix) -> None:
        self.patches.set(patch_bundle(prefix.child('patch_embed.proj'), self.tower, self.build))
        for i, layer in enumerate(self.layers):
            layer.load(prefix.child(f'blocks.{i}'))

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures ``[1, 3, H, W]`` of any whole numbers of blocks to ``[T, hidden]``, their patches block by block."""
        tower = self.tower
        x = self.patches(torch.cat([_blocks(picture[0], tower.patch_size, tower.merge) for picture in pictures]))
        patches = self._patches([(p.shape[2] // tower.patch_size, p.shape[3] // tower.patch_size) for p in pictures])
        added = None
        for i, layer in enumerate(self.layers):
            x, added = layer(x, added, patches, i not in tower.full_layers)
        return add(x, added, None)

    def _patches(self, grids: Sequence[tuple[int, int]]) -> Patches:
        """Of pictures of so many rows and columns of patches."""
        merge, device = self.tower.merge, self.build.device
        places = torch.cat([_places(rows, columns, merge) for rows, columns in grids])  # [T, 2]
        counts = [rows * columns for rows, columns in grids]
        angles = (places.to(device).float()[:, :, None] * self.frequencies).flatten(1)[:, None]  # [T, 1, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        windows = None
        if self.tower.window:
            side = self.tower.window // self.tower.patch_size
            picture = torch.arange(len(grids)).repeat_interleave(torch.tensor(counts))
            most = int(places.max()) // side + 1
            across = (picture * most + places[:, 0] // side) * most + places[:, 1] // side
            windows = Windows.of(across, device)
        return Patches(counts, (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), windows)


def _blocks(picture: Tensor, side: int, merge: int) -> Tensor:
    """``[3, H, W]`` to ``[patches, 3 * side * side]``, block by block."""
    rows, columns = picture.shape[1] // side // merge, picture.shape[2] // side // merge
    cut = picture.view(3, rows, merge, side, columns, merge, side)
    return cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3 * side**2)


def _places(rows: int, columns: int, merge: int) -> Tensor:
    """``[rows * columns, 2] int64``: row and column of every patch, block by block."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij'), -1)
    return grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)


def _in_pictures(q: Tensor, k: Tensor, v: Tensor, patches: Patches) -> Tensor:
    """Attention of every picture by itself; all ``[T, heads, D]``."""
    parts = zip(*(part.transpose(0, 1)[None].split(patches.counts, 2) for part in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)[0].transpose(0, 1)


def _in_windows(q: Tensor, k: Tensor, v: Tensor, patches: Patches) -> Tensor:
    """Attention of every window by itself; all ``[T, heads, D]``."""
    windows = patches.windows
    assert windows is not None
    q, k, v = (part[windows.pad].transpose(1, 2) for part in (q, k, v))  # [W, heads, L, D]
    mask = None if windows.there is None else windows.there[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return out.flatten(0, 1)[windows.back]
