"""LLaVA-1.5 and LLaVA-NeXT (Liu et al., 2023, 2024): CLIP's or SigLIP's tower and an MLP into the decoder's space.

LLaVA-NeXT reads a thumbnail and the tiles of a larger canvas; their features are put together again, without the
canvas's padding, and with a learned newline at the end of every row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmdeploy.config.vision import LLAVA_NEXT, Layout, VisionModelConfig, unpadded
from lmdeploy.models.vision.encoder import Levels, first_child, unused_layers
from lmdeploy.models.vision.vit import CLIP, SIGLIP, ViT, vector
from lmdeploy.nn.build import Build
from lmdeploy.nn.mlp import MLP
from lmdeploy.weights.checkpoint import Prefix


class LlavaEncoder:
    """See :class:`~lmdeploy.models.vision.encoder.VisionEncoder`."""

    def __init__(self, config: VisionModelConfig, build: Build) -> None:
        self.config, self.build = config, build
        tower = config.tower
        self.levels = Levels(config.picture, build)
        names = CLIP if tower.kind == 'clip' else SIGLIP
        self.tower = ViT(tower, names, tower.num_layers + config.feature_layer + 1, build)
        self.projector = MLP(build, tower.hidden_size, config.hidden_size, config.projector_activation,
                             config.hidden_size, config.projector_bias)  # fmt: skip
        self.newline: Tensor | None = None

    @property
    def ignore(self) -> tuple[str, ...]:
        tower = r'vision_tower\.(vision_model\.)?'
        return (*unused_layers(self.tower, self.config.tower.num_layers), rf'{tower}post_layernorm\.',
                rf'{tower}head\.', r'\.position_ids$')

    def load(self, prefix: Prefix) -> None:
        tower = first_child(prefix, ('model.vision_tower', 'vision_tower'))
        self.tower.load(tower.child('vision_model') if tower.has('vision_model') else tower)
        projector = first_child(prefix, ('model.multi_modal_projector', 'multi_modal_projector'))
        self.projector.load(projector.child('linear_1'), projector.child('linear_2'))
        if self.config.architecture == LLAVA_NEXT:
            home = prefix.child('model') if prefix.has('model.image_newline') else prefix
            self.newline = vector(home, 'image_newline', self.config.hidden_size, self.build)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        config, width, hidden = self.config, self.config.tower.hidden_size, self.config.hidden_size
        shapes = self.tower.shapes('vision_tower.vision_model')
        for name, shape in (('linear_1', (hidden, width)), ('linear_2', (hidden, hidden))):
            shapes[f'multi_modal_projector.{name}.weight'] = shape
            if config.projector_bias:
                shapes[f'multi_modal_projector.{name}.bias'] = shape[:1]
        if config.architecture == LLAVA_NEXT:
            shapes['image_newline'] = (hidden,)
        return shapes

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        counts = [len(part) * self.config.tokens_per_tile for part in pixels]
        x = self.tower(self.levels(torch.cat(tuple(pixels))))[:, self.config.drop_first :]
        return list(self.projector(x.flatten(0, 1)).split(counts))

    @torch.inference_mode()
    def join(self, features: Tensor, layout: Layout) -> Tensor:
        if self.newline is None:
            return features
        side = self.config.tower.image_size // self.config.tower.patch_size
        rows, columns = layout.grid
        thumbnail, tiles = features[: side * side], features[side * side :]
        canvas = tiles.view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        high, wide = unpadded(layout.size, rows * side, columns * side)
        canvas = canvas[high.start : high.stop, wide.start : wide.stop]
        canvas = torch.cat((canvas, self.newline.expand(len(high), 1, -1)), 1)
        return torch.cat((thumbnail, canvas.flatten(0, 1)))
