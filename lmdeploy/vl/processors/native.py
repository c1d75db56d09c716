"""A picture in its own shape (Qwen2-VL, Wang et al. 2024): scaled a little, so that both sides are whole patches."""

from __future__ import annotations

import math

from PIL import Image

from lmdeploy.config.vision import Layout, VisionModelConfig
from lmdeploy.errors import RequestError
from lmdeploy.vl.processor import PLAIN, ImageOptions, Processed, check_shape, cut, rgb


class NativeProcessor:
    """See :class:`~lmdeploy.vl.processor.Processor`."""

    def __init__(self, config: VisionModelConfig) -> None:
        self.picture, self.merge = config.picture, config.tower.merge
        self.unit = config.tower.patch_size * config.tower.merge  # pixels a side of what becomes one token

    def layout(self, size: tuple[int, int], options: ImageOptions = PLAIN) -> Layout:
        check_shape(size)
        least, most = self._range(options)
        width, height = scaled(size, self.unit, least, most)
        rows, columns = height // self.unit, width // self.unit
        return Layout(size, (rows, columns), 1, rows * columns, rows * columns * self.merge**2)

    def process(self, image: Image.Image, options: ImageOptions = PLAIN) -> Processed:
        layout = self.layout(image.size, options)
        rows, columns = layout.grid
        image = rgb(image).resize((columns * self.unit, rows * self.unit), self.picture.resample)
        return Processed(cut(image, image.height, image.width), layout)

    def _range(self, options: ImageOptions) -> tuple[int, int]:
        """The pixels that a picture is scaled to."""
        picture = self.picture
        least = picture.min_pixels if options.min_pixels is None else options.min_pixels
        most = picture.max_pixels if options.max_pixels is None else options.max_pixels
        if options.min_pixels is None:
            least = min(least, most)
        if not 1 <= least <= most <= picture.max_pixels:
            raise RequestError('LMD-653', least=least, most=most, cap=picture.max_pixels)
        return least, most


def scaled(size: tuple[int, int], unit: int, least: int, most: int) -> tuple[int, int]:
    """The (width, height) nearest to ``size`` in whole units, with at least ``least`` and at most ``most`` pixels."""
    width, height = (round(side / unit) * unit for side in size)
    pixels = size[0] * size[1]
    if width * height > most:
        shrink = math.sqrt(pixels / most)
        width, height = (max(unit, math.floor(side / shrink / unit) * unit) for side in size)
    elif width * height < least:
        stretch = math.sqrt(least / pixels)
        width, height = (math.ceil(side * stretch / unit) * unit for side in size)
    return width, height
