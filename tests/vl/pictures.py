"""Pictures of odd sizes and modes, the same ones every time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from PIL import Image

MODES = ('RGB', 'RGB', 'RGB', 'L', 'RGBA', 'LA', 'P', '1', 'CMYK', 'YCbCr', 'HSV')


def picture(width: int, height: int, seed: int = 0, mode: str = 'RGB') -> Image.Image:
    """Smooth colours with some noise."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * (0.01 + 0.03 * noise.random()) + y * (0.01 + 0.03 * noise.random()) + channel) for channel in
             range(3)]  # fmt: skip
    values = np.stack(waves, -1) * 110 + 128 + noise.integers(-17, 17, (height, width, 3))
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if mode in ('RGBA', 'LA'):
        image.putalpha(Image.fromarray(noise.integers(0, 256, (height, width), np.uint8)))
    return image if image.mode == mode else image.convert(mode)


def pictures(count: int) -> Iterator[Image.Image]:
    """Mostly small ones, of all shapes from thin to wide."""
    chance = random.Random(11)
    for seed in range(count):
        width, height = (int(2 ** chance.uniform(3, 8.5)) for _ in range(2))
        yield picture(width, height, seed, MODES[seed % len(MODES)])
