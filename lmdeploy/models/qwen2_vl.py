"""Qwen2-VL and Qwen2.5-VL: pictures in their own shape, over Qwen2's decoder with positions of three rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmdeploy.config.vision import Layout, VisionModelConfig
from lmdeploy.models.vision.encoder import Levels, first_child
from lmdeploy.models.vision.qwen import QwenTower
from lmdeploy.models.vision.vit import norm
from lmdeploy.nn.build import Build
from lmdeploy.nn.mlp import MLP
from lmdeploy.weights.checkpoint import Prefix


class QwenEncoder:
    """See :class:`~lmdeploy.models.vision.encoder.VisionEncoder`. A picture is one tile."""

    def __init__(self, config: VisionModelConfig, build: Build) -> None:
        self.config, self.build = config, build
        tower = config.tower
        self.levels = Levels(config.picture, build)
        self.tower = QwenTower(tower, build)
        self.norm = norm(tower, build)
        self.width = tower.hidden_size * tower.merge**2
        self.merger = MLP(build, self.width, self.width, 'gelu', config.hidden_size)

    @property
    def ignore(self) -> tuple[str, ...]:
        return ()

    def load(self, prefix: Prefix) -> None:
        tower = first_child(prefix, ('model.visual', 'visual'))
        self.tower.load(tower)
        merger = tower.child('merger')
        self.norm.load(merger.child('ln_q'))
        self.merger.load(merger.child('mlp.0'), merger.child('mlp.2'))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tower, hidden, inner = self.config.tower, self.config.tower.hidden_size, self.config.tower.intermediate_size
        side, width, out = tower.patch_size, self.width, self.config.hidden_size
        linears = {'attn.qkv': (3 * hidden, hidden), 'attn.proj': (hidden, hidden)}
        linears |= ({'mlp.gate_proj': (inner, hidden), 'mlp.up_proj': (inner, hidden), 'mlp.down_proj': (hidden, inner)}
                    if tower.rms_norm else {'mlp.fc1': (inner, hidden), 'mlp.fc2': (hidden, inner)})
        vectors = ('weight',) if tower.rms_norm else ('weight', 'bias')
        shapes: dict[str, tuple[int, ...]] = {'patch_embed.proj.weight': (hidden, 3, tower.frames, side, side)}
        for i in range(tower.num_layers):
            for name, shape in linears.items():
                shapes |= {f'blocks.{i}.{name}.weight': shape, f'blocks.{i}.{name}.bias': shape[:1]}
            shapes |= {f'blocks.{i}.{name}.{part}': (hidden,) for name in ('norm1', 'norm2') for part in vectors}
        shapes |= {f'merger.ln_q.{part}': (hidden,) for part in vectors}
        for name, shape in (('mlp.0', (width, width)), ('mlp.2', (out, width))):
            shapes |= {f'merger.{name}.weight': shape, f'merger.{name}.bias': shape[:1]}
        return {f'visual.{name}': shape for name, shape in shapes.items()}

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        x = self.tower([self.levels(picture) for picture in pixels])
        tokens = self.merger(self.norm(x).view(-1, self.width))
        unit = (self.config.tower.patch_size * self.config.tower.merge) ** 2
        return list(tokens.split([picture.shape[2] * picture.shape[3] // unit for picture in pixels]))

    def join(self, features: Tensor, layout: Layout) -> Tensor:
        return features
