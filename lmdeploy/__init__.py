"""lmdeploy: compress, deploy and serve large language and vision-language models.

The names below are imported on first use, so that ``import lmdeploy`` stays a matter of milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmdeploy.version import __version__, version_info

if TYPE_CHECKING:
    from lmdeploy.api import client, pipeline, serve
    from lmdeploy.messages import (
        GenerationConfig,
        PytorchEngineConfig,
        Response,
        TurbomindEngineConfig,
        VisionConfig,
    )
    from lmdeploy.model import ChatTemplateConfig
    from lmdeploy.pipe import Pipeline
    from lmdeploy.tokenizer import Tokenizer

_HOMES = {
    'pipeline': 'lmdeploy.api',
    'client': 'lmdeploy.api',
    'Pipeline': 'lmdeploy.pipe',
    'Tokenizer': 'lmdeploy.tokenizer',
    'ChatTemplateConfig': 'lmdeploy.model',
    'GenerationConfig': 'lmdeploy.messages',
    'TurbomindEngineConfig': 'lmdeploy.messages',
    'PytorchEngineConfig': 'lmdeploy.messages',
    'VisionConfig': 'lmdeploy.messages',
    'Response': 'lmdeploy.messages',
}

__all__ = [
    'ChatTemplateConfig',
    'GenerationConfig',
    'Pipeline',
    'PytorchEngineConfig',
    'Response',
    'Tokenizer',
    'TurbomindEngineConfig',
    'VisionConfig',
    '__version__',
    'client',
    'pipeline',
    'serve',
    'version_info',
]


def __getattr__(name: str) -> Any:
    if name == 'serve':  # a package and a function at once
        return import_module('lmdeploy.serve')
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
