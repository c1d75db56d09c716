"""LLaVA-NeXT's "any resolution" (Liu et al. 2024): a thumbnail, and the tiles of a canvas that the picture fits into.

Of the canvases that a model lists, the one is taken on which most of the picture's pixels survive, and of equals the
one with the least padding. In the embeddings the padding is cut off again, and every row of the canvas ends in a
newline.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from lmdeploy.config.vision import Layout, VisionModelConfig, unpadded
from lmdeploy.vl.processor import PLAIN, ImageOptions, Processed, cut, rgb


class AnyresProcessor:
    """See :class:`~lmdeploy.vl.processor.Processor`."""

    def __init__(self, config: VisionModelConfig) -> None:
        self.config, self.picture, self.side = config, config.picture, config.tower.image_size

    def layout(self, size: tuple[int, int], options: ImageOptions = PLAIN) -> Layout:
        height, width = self._canvas(size)
        rows, columns = height // self.side, width // self.side
        patches = self.side // self.config.tower.patch_size
        high, wide = unpadded(size, rows * patches, columns * patches)
        tiles = 1 + rows * columns
        tokens = self.config.tokens_per_tile + len(high) * (len(wide) + 1)
        return Layout(size, (rows, columns), tiles, tokens, tiles * self.config.patches_per_tile)

    def process(self, image: Image.Image, options: ImageOptions = PLAIN) -> Processed:
        layout, side, resample = self.layout(image.size, options), self.side, self.picture.resample
        image, (rows, columns) = rgb(image), layout.grid
        canvas = Image.new('RGB', (columns * side, rows * side))
        width, height = _fit(image.size, canvas.size)
        corner = (canvas.width - width) // 2, (canvas.height - height) // 2
        canvas.paste(image.resize((width, height), resample), corner)
        thumbnail = cut(image.resize((side, side), resample), side, side)
        return Processed(np.concatenate([thumbnail, cut(canvas, side, side)]), layout)

    def _canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width)."""
        own = size[0] * size[1]
        best, most, least = self.picture.pinpoints[0], -1, 0
        for height, width in self.picture.pinpoints:
            scale = min(width / size[0], height / size[1])
            kept = min(int(size[0] * scale) * int(size[1] * scale), own)
            padding = width * height - kept
            if kept > most or kept == most and padding < least:
                best, most, least = (height, width), kept, padding
        return best


def _fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) of a picture that is scaled into a canvas."""
    wide, high = canvas[0] / size[0], canvas[1] / size[1]
    if wide < high:
        return canvas[0], min(math.ceil(size[1] * wide), canvas[1])
    return min(math.ceil(size[0] * high), canvas[0]), canvas[1]
