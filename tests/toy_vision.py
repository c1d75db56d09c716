"""A complete vision model folder that is tiny: random InternVL weights over the toy of tests/toy.py, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.toy import SPECIALS, write_model

IMAGE_SPECIALS = ['<IMG_CONTEXT>', '<img>', '</img>']
TOWER = {'architectures': ['InternVisionModel'], 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2,
         'intermediate_size': 48, 'image_size': 56, 'patch_size': 14, 'norm_type': 'layer_norm', 'qkv_bias': True,
         'qk_normalization': False}  # fmt: skip
TILE_TOKENS = 4


def write_vision_model(folder: Path, seed: int = 0, **overrides: object) -> Path:
    """A vision model that loads and answers (nonsense, which depends on its pictures)."""
    import torch
    from safetensors.torch import load_file, save_file

    from lmdeploy.config.vision import read_vision
    from lmdeploy.models.vision.encoder import build_encoder
    from lmdeploy.nn.build import Build

    SPECIALS.extend(IMAGE_SPECIALS)
    try:
        write_model(folder, seed, **({'max_position_embeddings': 1024} | overrides))
    finally:
        del SPECIALS[-len(IMAGE_SPECIALS):]
    language = json.loads((folder / 'config.json').read_text())
    config = {'architectures': ['InternVLChatModel'], 'llm_config': language, 'vision_config': TOWER,
              'downsample_ratio': 0.5, 'ps_version': 'v2', 'select_layer': -1, 'force_image_size': 56,
              'dynamic_image_size': True, 'min_dynamic_patch': 1, 'max_dynamic_patch': 12, 'use_thumbnail': True,
              'template': 'internvl2_5'}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = {f'language_model.{name}': value for name, value in load_file(folder / 'model.safetensors').items()}
    for name, shape in build_encoder(read_vision(config), Build(torch.float32)).shapes().items():
        tensors[name] = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.5)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def picture(width: int = 28, height: int = 28, seed: int = 0) -> Image.Image:
    """A picture of noise, in blocks that survive a change of size."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
