"""Processor: from a picture to the tiles that a vision tower reads; Pillow and numpy alone.

Pixels stay bytes: what the tower reads are the float32 values of ``PictureConfig.levels``, which the encoder looks up
on its device. So a prepared picture takes a quarter of the memory, on the way to the engine's process too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from lmdeploy.config.vision import Layout, PictureConfig, VisionModelConfig
from lmdeploy.errors import RequestError

LONGEST = 200  # times as long as wide


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a message may ask for one picture; what does not concern a model is passed over.

    Attributes:
        max_dynamic_patch: tiles at most, for pictures that are cut into a grid.
        detail: ``'low'``, ``'medium'``, ``'high'``: the same in words; ``'auto'`` and ``''``: the model's own.
        min_pixels, max_pixels: for pictures that keep their own shape.
    """

    max_dynamic_patch: int | None = None
    detail: str = ''
    min_pixels: int | None = None
    max_pixels: int | None = None


PLAIN = ImageOptions()


@dataclass(frozen=True, slots=True, eq=False)
class Processed:
    """A prepared picture.

    Attributes:
        pixels: ``[tiles, 3, H, W] uint8``, contiguous.
    """

    pixels: np.ndarray
    layout: Layout


class Processor(Protocol):
    """Prepares the pictures of one model; safe to use from several threads."""

    def layout(self, size: tuple[int, int], options: ImageOptions = PLAIN) -> Layout:
        """What a picture of ``(width, height)`` becomes, without its pixels.

        Raises:
            RequestError: LMD-650 to LMD-653: no such picture can be read, or the options are impossible.
        """
        ...

    def process(self, image: Image.Image, options: ImageOptions = PLAIN) -> Processed:
        """The picture as tiles; raises as :meth:`layout`."""
        ...


def build_processor(config: VisionModelConfig) -> Processor:
    """The processor of a model."""
    from lmdeploy.vl.processors import anyres, internvl, native, square

    kinds: dict[str, Callable[[VisionModelConfig], Processor]] = {
        'internvl': internvl.InternVLProcessor, 'crop': square.SquareProcessor, 'squash': square.SquareProcessor,
        'anyres': anyres.AnyresProcessor, 'native': native.NativeProcessor}  # fmt: skip
    return kinds[config.picture.tiling](config)


def check_shape(size: tuple[int, int]) -> None:
    """Refuse a picture whose sides cannot be scaled together.

    Raises:
        RequestError: LMD-652.
    """
    width, height = size
    if max(size) > LONGEST * min(size):
        raise RequestError('LMD-652', width=width, height=height, most=LONGEST)


def rgb(image: Image.Image) -> Image.Image:
    """The picture in three channels of 8 bits; what is transparent lies on white."""
    if 'A' in image.getbands() or image.info.get('transparency') is not None:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, (255, 255, 255, 255)), image)
    return image if image.mode == 'RGB' else image.convert('RGB')


def cut(image: Image.Image, height: int, width: int) -> np.ndarray:
    """``[n, 3, height, width] uint8``: the tiles of an RGB picture, row by row; both sides are whole tiles."""
    pixels = np.asarray(image)
    tiles = pixels.reshape(pixels.shape[0] // height, height, pixels.shape[1] // width, width, 3)
    return np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3)).reshape(-1, 3, height, width)


def normalised(pixels: np.ndarray, picture: PictureConfig) -> np.ndarray:
    """``[n, 3, H, W] uint8`` to the float32 values that the tower reads."""
    levels = np.array(picture.levels(), np.float32)
    return np.stack([levels[channel][pixels[:, channel]] for channel in range(3)], 1)
