"""The decoder inside of a vision model: its own spec, under the names that the whole gives it."""

from __future__ import annotations

from dataclasses import replace

from lmdeploy.config.vision import QWEN2_5_VL, QWEN2_VL
from lmdeploy.models.spec import DecoderSpec

NESTED = 'model.language_model'  # how transformers has written all of them since its version 5


def inside(spec: DecoderSpec, architecture: str) -> DecoderSpec:
    """``spec`` as the language part of ``architecture``."""
    names = spec.names
    if architecture in (QWEN2_VL, QWEN2_5_VL):
        return replace(spec, names=replace(names, roots=(NESTED, *names.roots)))
    part = 'language_model'
    roots = (NESTED, *(f'{part}.{root}' for root in names.roots))
    return replace(spec, names=replace(names, roots=roots, heads=(*(f'{part}.{head}' for head in names.heads),
                                                                  *names.heads)))
