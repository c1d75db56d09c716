"""InternVL 2, 2.5 and 3: InternViT, four patches joined to one, and an MLP into the decoder's space.

The original repositories and their conversions for transformers differ in names only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmdeploy.config.vision import INTERNVL, Layout, VisionModelConfig
from lmdeploy.models.vision.encoder import Levels, first_child, unused_layers
from lmdeploy.models.vision.vit import INTERN, INTERN_HF, ViT
from lmdeploy.nn.build import Build
from lmdeploy.nn.mlp import MLP
from lmdeploy.nn.norm import LayerNorm
from lmdeploy.weights.checkpoint import Prefix

PROJECTOR_EPS = 1e-5


class InternVLEncoder:
    """See :class:`~lmdeploy.models.vision.encoder.VisionEncoder`."""

    def __init__(self, config: VisionModelConfig, build: Build) -> None:
        self.config, self.build = config, build
        self.original = config.architecture == INTERNVL
        tower = config.tower
        self.levels = Levels(config.picture, build)
        names = INTERN if self.original else INTERN_HF
        self.tower = ViT(tower, names, tower.num_layers + config.feature_layer + 1, build)
        width = tower.hidden_size * tower.merge**2
        self.norm = LayerNorm(build, width, PROJECTOR_EPS)
        self.projector = MLP(build, width, config.hidden_size, config.projector_activation, config.hidden_size)

    @property
    def ignore(self) -> tuple[str, ...]:
        return unused_layers(self.tower, self.config.tower.num_layers)

    def load(self, prefix: Prefix) -> None:
        if self.original:
            tower, projector, names = prefix.child('vision_model'), prefix.child('mlp1'), ('0', '1', '3')
        else:
            tower = first_child(prefix, ('model.vision_tower', 'vision_tower'))
            projector = first_child(prefix, ('model.multi_modal_projector', 'multi_modal_projector'))
            names = 'layer_norm', 'linear_1', 'linear_2'
        self.tower.load(tower)
        self.norm.load(projector.child(names[0]))
        self.projector.load(projector.child(names[1]), projector.child(names[2]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        config, width = self.config, self.norm.size
        root, names = ('mlp1', ('0', '1', '3')) if self.original else (
            'multi_modal_projector', ('layer_norm', 'linear_1', 'linear_2'))
        weights = ((width,), (config.hidden_size, width), (config.hidden_size,) * 2)
        shapes = self.tower.shapes('vision_model' if self.original else 'vision_tower')
        for name, shape in zip(names, weights):
            shapes |= {f'{root}.{name}.weight': shape, f'{root}.{name}.bias': shape[:1]}
        return shapes

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        config = self.config
        counts = [len(part) * config.tokens_per_tile for part in pixels]
        x = self.tower(self.levels(torch.cat(tuple(pixels))))[:, config.drop_first :]
        x = pixel_shuffle(x, config.tower.merge, transposed=config.shuffle == 'v1')
        return list(self.projector(self.norm(x.flatten(0, 1))).split(counts))

    def join(self, features: Tensor, layout: Layout) -> Tensor:
        return features


def pixel_shuffle(x: Tensor, merge: int, transposed: bool) -> Tensor:
    """Join ``merge`` times ``merge`` neighbours of a square of positions into one of more channels.

    Args:
        x: ``[tiles, side * side, C]``.
        transposed: the joined positions go column by column, as the first version of InternVL's code had it.

    Returns:
        ``[tiles, (side / merge)^2, C * merge^2]``.
    """
    side = round(x.shape[1] ** 0.5)
    blocks = x.reshape(x.shape[0], side // merge, merge, side // merge, merge, x.shape[2])
    order = (0, 3, 1, 2, 4, 5) if transposed else (0, 1, 3, 2, 4, 5)
    return blocks.permute(order).reshape(x.shape[0], (side // merge) ** 2, -1)
