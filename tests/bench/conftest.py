"""A server over a fake device, and a tiny model."""

from __future__ import annotations

import pytest

from tests.serve.conftest import serve, tokenizer, toy_folder
from tests.toy import write_model

__all__ = ['serve', 'tokenizer', 'toy_folder']


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('bench') / 'toy')
