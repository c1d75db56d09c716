"""Tiles are, byte by byte, what the reference processors read: transformers' on Pillow, and InternVL's own rule."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lmdeploy.errors import RequestError
from lmdeploy.vl.processor import ImageOptions, build_processor, normalised, rgb
from tests.vl import configs
from tests.vl.pictures import picture, pictures

COUNT = 200
SIZES = [(56, COUNT), (448, 4)]  # the rules are the same for tiles of all sizes; small ones are quick


def floats(config, image: Image.Image) -> np.ndarray:
    processor = build_processor(config)
    done = processor.process(image)
    assert done.layout == processor.layout(image.size)
    assert done.pixels.dtype == np.uint8 and done.pixels.shape[:2] == (done.layout.tiles, 3)
    return normalised(done.pixels, config.picture)


def published_tiles(image: Image.Image, side: int, most: int = 12) -> np.ndarray:
    """InternVL's rule, step by step as its repositories describe it: ``[tiles, 3, side, side] uint8``."""
    width, height = image.size
    pairs = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most}
    chosen, nearest = (1, 1), float('inf')
    for i, j in sorted(pairs, key=lambda pair: pair[0] * pair[1]):
        distance = abs(width / height - i / j)
        if distance < nearest or distance == nearest and width * height > 0.5 * side * side * i * j:
            nearest, chosen = min(nearest, distance), (i, j)
    columns, rows = chosen
    resized = np.asarray(image.resize((side * columns, side * rows), Image.Resampling.BICUBIC))
    tiles = [resized[side * (k // columns):, side * (k % columns):][:side, :side] for k in range(columns * rows)]
    if len(tiles) > 1:
        tiles.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(tiles).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(('side', 'count'), SIZES)
def test_internvl_tiles_are_the_published_ones(side, count):
    processor = build_processor(configs.internvl(side))
    for image in pictures(count):
        assert np.array_equal(processor.process(image).pixels, published_tiles(rgb(image), side)), image


def test_levels_are_the_published_ones():
    values = np.array(configs.internvl().picture.levels())
    wanted = (np.arange(256) / 255 - np.array([[0.485], [0.456], [0.406]])) / np.array([[0.229], [0.224], [0.225]])
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(('side', 'count'), SIZES)
def test_internvl_hf_is_transformers(side, count):
    config, reference = configs.internvl_hf(side), GotOcr2ImageProcessorPil(
        size={'height': side, 'width': side}, crop_to_patches=True, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225])  # fmt: skip
    for image in pictures(count):
        assert np.array_equal(floats(config, image), np.stack(reference(image)['pixel_values'])), image


@pytest.mark.parametrize(('side', 'count'), [(84, COUNT), (336, 10)])
def test_clip_is_transformers(side, count):
    reference = CLIPImageProcessorPil(size={'shortest_edge': side}, crop_size={'height': side, 'width': side})
    for image in pictures(count):
        found = floats(configs.llava(size=side), image)
        assert np.array_equal(found, np.stack(reference(image)['pixel_values'])), image


@pytest.mark.parametrize(('side', 'count'), [(84, COUNT), (384, 5)])
def test_siglip_is_transformers(side, count):
    config = configs.llava(model_type='siglip_vision_model', size=side, vision_feature_select_strategy='full')
    reference = SiglipImageProcessorPil(size={'height': side, 'width': side})
    for image in pictures(count):
        assert np.array_equal(floats(config, image), np.stack(reference(image)['pixel_values'])), image


@pytest.mark.parametrize(('side', 'count'), [(56, COUNT), (336, 4)])
def test_llava_next_is_transformers(side, count):
    points = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    config = configs.llava('LlavaNextForConditionalGeneration', size=side, image_grid_pinpoints=points)
    reference = LlavaNextImageProcessorPil(size={'shortest_edge': side}, crop_size={'height': side, 'width': side},
                                           image_grid_pinpoints=points)  # fmt: skip
    for image in pictures(count):
        assert np.array_equal(floats(config, image), reference(image)['pixel_values'][0]), image


@pytest.mark.parametrize(('least', 'most'), [(56 * 56, 28 * 28 * 60), (200 * 200, 28 * 28 * 100)])
def test_qwen_is_transformers(least, most):
    config = configs.qwen(min_pixels=least, max_pixels=most)
    reference = Qwen2VLImageProcessorPil(size={'shortest_edge': least, 'longest_edge': most})
    for image in pictures(COUNT):
        found, wanted = floats(config, image), reference(image)
        rows, columns = build_processor(config).layout(image.size).grid
        assert wanted['image_grid_thw'].tolist() == [[1, rows * 2, columns * 2]]
        patches = reference.patchify(found[0], 14, 2, 2)[0]
        assert np.array_equal(patches, wanted['pixel_values']), image


@pytest.mark.parametrize(('size', 'grid', 'tiles'), [
    ((278, 182), (2, 3), 7), ((640, 427), (2, 3), 7), ((640, 480), (3, 4), 13), ((1024, 768), (3, 4), 13),
    ((1920, 1080), (2, 4), 9), ((640, 360), (1, 2), 3), ((896, 896), (2, 2), 5), ((448, 448), (1, 1), 1),
])  # fmt: skip
def test_internvl_tile_counts(size, grid, tiles):
    layout = build_processor(configs.internvl()).layout(size)
    assert (layout.grid, layout.tiles, layout.tokens) == (grid, tiles, 256 * tiles)


def test_tiles_per_picture():
    processor = build_processor(configs.internvl())
    tiles = {detail: processor.layout((2000, 1990), ImageOptions(detail=detail)).tiles for detail in
             ('low', 'medium', 'high', 'auto', '')}  # fmt: skip
    assert tiles == {'low': 5, 'medium': 10, 'high': 17, 'auto': 10, '': 10}
    assert processor.layout((1000, 500), ImageOptions(max_dynamic_patch=1)).tiles == 1
    assert processor.process(picture(1000, 500), ImageOptions(max_dynamic_patch=4)).layout.tiles == 3
    assert processor.layout((1000, 500), ImageOptions(max_dynamic_patch=2, detail='high')).tiles == 3


@pytest.mark.parametrize(('config', 'size', 'options', 'code'), [
    (configs.internvl(), (9, 9), ImageOptions(max_dynamic_patch=0), 'LMD-650'),
    (configs.internvl(), (9, 9), ImageOptions(max_dynamic_patch=10**6), 'LMD-650'),
    (configs.internvl(), (9, 9), ImageOptions(detail='huge'), 'LMD-651'),
    (configs.llava(), (5000, 3), ImageOptions(), 'LMD-652'),
    (configs.qwen(), (3, 5000), ImageOptions(), 'LMD-652'),
    (configs.qwen(), (9, 9), ImageOptions(min_pixels=10**9), 'LMD-653'),
    (configs.qwen(), (9, 9), ImageOptions(max_pixels=0), 'LMD-653'),
])  # fmt: skip
def test_refused(config, size, options, code):
    with pytest.raises(RequestError) as caught:
        build_processor(config).layout(size, options)
    assert caught.value.code == code


def test_thin_pictures_are_tiled():
    for size in ((1, 3000), (3000, 1)):
        layout = build_processor(configs.internvl()).process(picture(*size)).layout
        assert layout.tiles == 13 and max(layout.grid) == 12


def test_pixel_range_per_picture():
    processor = build_processor(configs.qwen())
    assert processor.layout((1000, 1000), ImageOptions(max_pixels=28 * 28 * 16)).tokens <= 16
    assert processor.layout((30, 30), ImageOptions(min_pixels=280 * 280)).tokens >= 100
