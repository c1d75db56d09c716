"""Fixtures of the whole suite: real models, fetched once into the user's model cache."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lmdeploy.hub.resolve import resolve


@pytest.fixture(autouse=True)
def log_level():
    """A test that changes the level of the package's logger changes it for itself only."""
    logger = logging.getLogger('lmdeploy')
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope='session')
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, Q4_1, 98 MB."""
    return resolve('smollm2:135m', progress=False).path


@pytest.fixture(scope='session')
def qwen_coder() -> Path:
    """The GGUF file of Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 491 MB."""
    return resolve('qwen2.5-coder:0.5b', progress=False).path
