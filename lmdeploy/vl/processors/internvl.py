"""InternVL's dynamic tiling (Chen et al. 2024, "How Far Are We to GPT-4V?"): a grid of square tiles and a thumbnail.

The grid is the one whose shape is nearest to the picture's. Of equally near ones, a later one (they are ordered by
area) is taken only if the picture has more than half of its pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from lmdeploy.config.vision import MAX_TILES, Layout, VisionModelConfig
from lmdeploy.errors import RequestError
from lmdeploy.vl.processor import PLAIN, ImageOptions, Processed, cut, rgb

DETAILS = {'low': 6, 'medium': 12, 'high': 24}  # tiles at most


class InternVLProcessor:
    """See :class:`~lmdeploy.vl.processor.Processor`."""

    def __init__(self, config: VisionModelConfig) -> None:
        self.config, self.picture, self.side = config, config.picture, config.tower.image_size

    def layout(self, size: tuple[int, int], options: ImageOptions = PLAIN) -> Layout:
        columns, rows = self._grid(size, most_tiles(options, self.picture.max_tiles))
        tiles = columns * rows
        tiles += self.picture.thumbnail and tiles > 1
        return Layout(size, (rows, columns), tiles, tiles * self.config.tokens_per_tile,
                      tiles * self.config.patches_per_tile)

    def process(self, image: Image.Image, options: ImageOptions = PLAIN) -> Processed:
        layout, side = self.layout(image.size, options), self.side
        image, (rows, columns) = rgb(image), layout.grid
        tiles = cut(image.resize((side * columns, side * rows), self.picture.resample), side, side)
        if layout.tiles > len(tiles):
            tiles = np.concatenate([tiles, cut(image.resize((side, side), self.picture.resample), side, side)])
        return Processed(tiles, layout)

    def _grid(self, size: tuple[int, int], most: int) -> tuple[int, int]:
        """(columns, rows)."""
        width, height = size
        shape, nearest, best = width / height, float('inf'), (1, 1)
        for columns, rows in grids(min(self.picture.min_tiles, most), most, self.picture.grid_order):
            distance = abs(shape - columns / rows)
            if distance < nearest:
                nearest, best = distance, (columns, rows)
            elif distance == nearest and width * height > 0.5 * self.side**2 * columns * rows:
                best = columns, rows
        return best


@lru_cache(maxsize=64)
def grids(least: int, most: int, order: str) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of ``least`` to ``most`` tiles, by area, and of one area in the order of the reference.

    For the original repositories (``'set'``) that is the order in which CPython walks through a set of pairs, which
    depends on how the set was filled; for Hugging Face's (``'width'``) they are ordered by columns.
    """
    if order == 'width':
        pairs = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1) if i * j >= least]
    else:
        pairs = list({(i, j) for n in range(least, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)
                      if least <= i * j <= most})
    return tuple(sorted(pairs, key=lambda pair: pair[0] * pair[1]))


def most_tiles(options: ImageOptions, usual: int) -> int:
    """The tiles that one picture may have at most, beside its thumbnail.

    Raises:
        RequestError: LMD-650: not between 1 and ``MAX_TILES``; LMD-651: no such detail.
    """
    most = options.max_dynamic_patch
    if most is not None:
        if not 1 <= most <= MAX_TILES:
            raise RequestError('LMD-650', value=most, most=MAX_TILES)
        return most
    if options.detail in ('', 'auto'):
        return usual
    if options.detail not in DETAILS:
        raise RequestError('LMD-651', value=options.detail[:40], known=', '.join((*DETAILS, 'auto')))
    return DETAILS[options.detail]
