"""One square per picture: the middle of it (CLIP), or all of it, squashed (SigLIP)."""

from __future__ import annotations

from PIL import Image

from lmdeploy.config.vision import Layout, VisionModelConfig
from lmdeploy.vl.processor import PLAIN, ImageOptions, Processed, check_shape, cut, rgb


class SquareProcessor:
    """See :class:`~lmdeploy.vl.processor.Processor`."""

    def __init__(self, config: VisionModelConfig) -> None:
        self.config, self.picture, self.side = config, config.picture, config.tower.image_size

    def layout(self, size: tuple[int, int], options: ImageOptions = PLAIN) -> Layout:
        if self.picture.tiling == 'crop':
            check_shape(size)
        return Layout(size, (1, 1), 1, self.config.tokens_per_tile, self.config.patches_per_tile)

    def process(self, image: Image.Image, options: ImageOptions = PLAIN) -> Processed:
        layout, side = self.layout(image.size, options), self.side
        image = rgb(image)
        if self.picture.tiling == 'squash':
            return Processed(cut(image.resize((side, side), self.picture.resample), side, side), layout)
        short, shorter = self.picture.resize, min(image.size)
        width, height = (short if edge == shorter else int(short * edge / shorter) for edge in image.size)
        image = image.resize((width, height), self.picture.resample)
        left, top = (width - side) // 2, (height - side) // 2
        return Processed(cut(image.crop((left, top, left + side, top + side)), side, side), layout)
