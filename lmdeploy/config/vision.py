"""VisionModelConfig: what config.json and preprocessor_config.json say about the pictures that a model reads.

The language part of such a model is an ordinary :class:`~lmdeploy.config.model.ModelConfig`; this is the rest: the
tower, what joins it to the decoder, how a picture becomes tiles, and how prompts write one. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmdeploy.config.fields import Fields
from lmdeploy.errors import ConfigError

INTERNVL, INTERNVL_HF = 'InternVLChatModel', 'InternVLForConditionalGeneration'
LLAVA, LLAVA_NEXT = 'LlavaForConditionalGeneration', 'LlavaNextForConditionalGeneration'
QWEN2_VL, QWEN2_5_VL = 'Qwen2VLForConditionalGeneration', 'Qwen2_5_VLForConditionalGeneration'
VISION_MODELS = (INTERNVL, INTERNVL_HF, LLAVA, LLAVA_NEXT, QWEN2_VL, QWEN2_5_VL)

MAX_TILES = 64  # that a picture can be cut into
TowerKind = Literal['intern', 'clip', 'siglip', 'qwen2', 'qwen2_5']
Tiling = Literal['internvl', 'crop', 'squash', 'anyres', 'native']


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """The shape of a vision transformer.

    Attributes:
        image_size: side of a tile in pixels; 0: pictures keep their own.
        patch_size: side of a patch in pixels.
        rms_norm: norms are RMS norms, else layer norms.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are RMS-normalised over all heads together.
        frames: frames that one patch spans.
        merge: patches per side that become one token of the decoder.
        window: side of an attention window in pixels; 0: all layers see the whole picture.
        full_layers: layers that see the whole picture all the same.
    """

    kind: TowerKind
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    norm_eps: float
    activation: str
    rms_norm: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    frames: int = 1
    merge: int = 1
    window: int = 0
    full_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PictureConfig:
    """How a picture becomes the tower's input.

    Attributes:
        tiling: ``'internvl'``: a grid of square tiles and a thumbnail. ``'crop'``: the shorter side to ``resize``, then
            the middle. ``'squash'``: straight to a square. ``'anyres'``: a thumbnail, and tiles of the best of
            ``pinpoints``. ``'native'``: the picture's own shape, in whole patches.
        mean, std: per channel, of values from 0 to 1.
        resample: Pillow's number of the filter.
        resize: ``'crop'`` and ``'anyres'``: length of the shorter side before the crop.
        min_tiles, max_tiles, thumbnail: ``'internvl'``.
        grid_order: ``'internvl'``: how grids of equal area are ordered, which decides ties.
        pinpoints: ``'anyres'``: ``(height, width)`` of every possible canvas.
        min_pixels, max_pixels: ``'native'``.
    """

    tiling: Tiling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    resize: int = 0
    min_tiles: int = 1
    max_tiles: int = 1
    thumbnail: bool = False
    grid_order: Literal['set', 'width'] = 'set'
    pinpoints: tuple[tuple[int, int], ...] = ()
    min_pixels: int = 0
    max_pixels: int = 0

    def levels(self) -> list[list[float]]:
        """``[3][256]``: what each value of each channel becomes, in the float32 arithmetic of reference processors."""
        import numpy as np

        values = (np.arange(256) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(moment, np.float32)[:, None] for moment in (self.mean, self.std))
        return ((values - mean) / std).tolist()


@dataclass(frozen=True, slots=True)
class Layout:
    """What is known of a prepared picture without its pixels.

    Attributes:
        size: ``(width, height)`` as given.
        grid: ``(rows, columns)`` of its tiles, thumbnail not included; where it keeps its own shape, of its tokens.
        tiles: how many can be encoded apart from each other.
        tokens: embeddings that it becomes.
        patches: positions that the tower computes for it.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    tiles: int
    tokens: int
    patches: int


def unpadded(size: tuple[int, int], rows: int, columns: int) -> tuple[range, range]:
    """The rows and columns that a picture of ``size`` fills of a canvas into which it was scaled, in the middle."""
    width, height = size
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return range(margin, rows - margin), range(columns)
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return range(rows), range(margin, columns - margin)


@dataclass(frozen=True, slots=True)
class VisionModelConfig:
    """All that a model adds to its decoder.

    Attributes:
        architecture: one of ``VISION_MODELS``.
        hidden_size: of the decoder, and so of the embeddings.
        feature_layer: the hidden states that are taken: -1 the last layer's, 0 what goes into the first.
        drop_first: the first position (the class token) is left out.
        shuffle: ``'v1'``, ``'v2'``: patches are merged by pixel shuffle, of which v1 leaves the picture transposed.
        projector_activation, projector_bias: of the MLP that joins tower and decoder.
        image_token: how a chat template writes one embedding in the prompt.
        image_token_id: its id; None: what the tokenizer gives ``image_token``.
        before, after: the text around a picture's tokens; where templates write it themselves, prompts that no
            template has made need it.
        mrope: the decoder's positions have three rows, see :mod:`lmdeploy.vl.mrope`.
    """

    architecture: str
    tower: TowerConfig
    picture: PictureConfig
    hidden_size: int
    feature_layer: int = -1
    drop_first: bool = False
    shuffle: Literal['', 'v1', 'v2'] = ''
    projector_activation: str = 'gelu'
    projector_bias: bool = True
    image_token: str = '<image>'
    image_token_id: int | None = None
    before: str = ''
    after: str = ''
    mrope: bool = False

    @property
    def tokens_per_tile(self) -> int:
        """Embeddings that a square tile becomes; 0 where pictures keep their own shape."""
        tower = self.tower
        patches = (tower.image_size // tower.patch_size) ** 2
        if not self.shuffle:
            return patches + (tower.kind == 'clip') - self.drop_first if patches else 0
        return patches // tower.merge**2

    @property
    def patches_per_tile(self) -> int:
        """Positions that the tower computes for a square tile, what a budget of work is counted in."""
        tower = self.tower
        return (tower.image_size // tower.patch_size) ** 2 + (tower.kind in ('intern', 'clip'))


def is_vision_model(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that reads pictures."""
    names = config.get('architectures')
    return isinstance(names, list) and bool(names) and names[0] in VISION_MODELS


def vision_model(path: Path) -> VisionModelConfig | None:
    """The vision part of a model, of a folder or file; None: it has none. What else is wrong is told by who loads it.

    Raises:
        ConfigError: as :func:`read_vision`.
    """
    folder = beside(path) if path.is_file() else path
    config = _json(folder / 'config.json') if folder is not None else {}
    return read_vision(config, read_preprocessor(path)) if is_vision_model(config) else None


def beside(path: Path) -> Path | None:
    """The folder with the vision part of a language model in one file: ``NAME.vision`` beside ``NAME.gguf``."""
    folder = path.with_suffix('.vision')
    return folder if path.suffix == '.gguf' and (folder / 'config.json').is_file() else None


def read_preprocessor(path: Path) -> dict[str, Any]:
    """What a folder says about preparing pictures: preprocessor_config.json, or that part of processor_config.json."""
    found = _json(path / 'preprocessor_config.json')
    if found:
        return found
    nested = _json(path / 'processor_config.json').get('image_processor')
    return nested if isinstance(nested, dict) else {}


def read_vision(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> VisionModelConfig:
    """Read and check the vision part of a config.

    Args:
        config: the content of config.json.
        preprocessor: the content of preprocessor_config.json; without it the usual values of the architecture hold.

    Raises:
        ConfigError: LMD-110: no such architecture; LMD-112 to LMD-115: a field that is missing, impossible or not
            supported, by name and value.
    """
    from lmdeploy.config import vision_families as families

    if not is_vision_model(config):
        names = config.get('architectures')
        name = str(names[0])[:80] if isinstance(names, list) and names else '?'
        raise ConfigError('LMD-110', architecture=name, known=', '.join(VISION_MODELS))
    top, pictures = Fields(config), Fields(preprocessor or {}, 'preprocessor_config.json: ')
    tower = top.object('vision_config')
    if tower is None:
        raise ConfigError('LMD-112', field='vision_config', wanted='an object of named fields')
    architecture = config['architectures'][0]
    if architecture in (INTERNVL, INTERNVL_HF):
        return families.internvl(architecture, top, tower, pictures)
    if architecture in (LLAVA, LLAVA_NEXT):
        return families.llava(architecture, top, tower, pictures)
    return families.qwen(architecture, top, tower, pictures)


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none: who opens the checkpoint tells what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
