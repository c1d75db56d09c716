"""VisionEncoder: the face of all vision encoders, and their choice.

Life: built, :meth:`VisionEncoder.load` once from the checkpoint that the decoder comes from, then any number of calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lmdeploy.config.vision import INTERNVL, INTERNVL_HF, LLAVA, LLAVA_NEXT, Layout, PictureConfig, VisionModelConfig
from lmdeploy.models.vision.vit import ViT
from lmdeploy.nn.build import Build
from lmdeploy.weights.checkpoint import Prefix


class VisionEncoder(Protocol):
    """Tower and projector of one model on one device.

    Attributes:
        config: whose ``hidden_size`` is the width of the embeddings.
        build: whose ``dtype`` and ``device`` are theirs.
    """

    config: VisionModelConfig
    build: Build

    @property
    def ignore(self) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold and this encoder does not need."""
        ...

    def load(self, prefix: Prefix) -> None:
        """Pull every tensor from the checkpoint whose top is ``prefix``.

        Raises:
            LoadError: a tensor is missing or has the wrong shape.
        """
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors that :meth:`load` pulls, for made-up weights."""
        ...

    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Features of the tiles of several pictures, in one forward.

        Args:
            pixels: per entry ``[n, 3, H, W] uint8`` on any device: all or some tiles of one picture.

        Returns:
            Per entry ``[n * features of a tile, width]`` on the encoder's device.
        """
        ...

    def join(self, features: Tensor, layout: Layout) -> Tensor:
        """The features of all tiles of a picture, in their order, as its embeddings ``[layout.tokens, hidden]``."""
        ...


def build_encoder(config: VisionModelConfig, build: Build) -> VisionEncoder:
    """The encoder of a model, without weights."""
    from lmdeploy.models import internvl, llava, qwen2_vl

    if config.architecture in (INTERNVL, INTERNVL_HF):
        return internvl.InternVLEncoder(config, build)
    if config.architecture in (LLAVA, LLAVA_NEXT):
        return llava.LlavaEncoder(config, build)
    return qwen2_vl.QwenEncoder(config, build)


class Levels:
    """Bytes of pictures to what the tower reads, by a table of all values."""

    def __init__(self, picture: PictureConfig, build: Build) -> None:
        self.table = torch.tensor(picture.levels(), device=build.device).to(build.dtype)  # [3, 256]

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[n, 3, H, W] uint8`` on any device to the same shape in the engine's dtype, on its device."""
        bytes_ = pixels.to(self.table.device).int()
        return torch.stack([self.table[channel][bytes_[:, channel]] for channel in range(3)], 1)


def first_child(prefix: Prefix, names: Sequence[str]) -> Prefix:
    """The first of ``names`` that the checkpoint has, or the last."""
    return prefix.child(next((name for name in names if prefix.has(name)), names[-1]))


def unused_layers(tower: ViT, layers: int) -> tuple[str, ...]:
    """Patterns of the layers of a checkpoint's ``layers`` behind the one whose output is taken."""
    return tuple(rf'vision_(tower|model)\..*{re.escape(tower.names.layers)}\.{i}\.' for i in
                 range(len(tower.layers), layers))
