"""TileGraphs: a vision encoder whose calls with few tiles are recorded, one graph per number of tiles.

A tower is some three hundred launches, which take the host several times as long as the device computes for one tile.
Where text is being written, steps have no more tiles than that. A graph reads its pixels from static memory; what it
computes is copied before the next one runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmdeploy.config.vision import Layout
from lmdeploy.models.vision.encoder import VisionEncoder
from lmdeploy.runner.graphs import Record, Replay
from lmdeploy.weights.checkpoint import Prefix

MOST = 6  # tiles; the device computes longer for more than the host launches


class TileGraphs:
    """Implements :class:`~lmdeploy.models.vision.encoder.VisionEncoder` by one that reads square tiles.

    Args:
        encoder: with its weights; a group of ranks runs without graphs.
        record: makes the graphs.
    """

    def __init__(self, encoder: VisionEncoder, record: Record) -> None:
        side = encoder.config.tower.image_size
        assert side and encoder.build.group.size == 1
        self.encoder, self.config, self.build = encoder, encoder.config, encoder.build
        self._pixels = torch.zeros(MOST, 3, side, side, dtype=torch.uint8, device=encoder.build.device)
        self._features: dict[int, Tensor] = {}
        self._replays = {count: self._record(count, record) for count in range(MOST, 0, -1)}

    @property
    def ignore(self) -> tuple[str, ...]:
        return self.encoder.ignore

    def load(self, prefix: Prefix) -> None:
        raise RuntimeError('weights are loaded before graphs are recorded')

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.encoder.shapes()

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        count = sum(map(len, pixels))
        if count not in self._replays:
            return self.encoder(pixels)
        start = 0
        for part in pixels:
            self._pixels[start : start + len(part)].copy_(part, non_blocking=True)
            start += len(part)
        self._replays[count]()
        features = self._features[count].clone()
        return list(features.split([len(part) * self.config.tokens_per_tile for part in pixels]))

    def join(self, features: Tensor, layout: Layout) -> Tensor:
        return self.encoder.join(features, layout)

    @torch.inference_mode()
    def _record(self, count: int, record: Record) -> Replay:
        def step() -> None:
            self._features[count] = self.encoder([self._pixels[:count]])[0]

        return record(step)


def records(encoder: VisionEncoder) -> bool:
    """Whether an encoder's calls can be recorded: its tiles are squares, and it has one rank."""
    return encoder.config.tower.image_size > 0 and encoder.build.group.size == 1
