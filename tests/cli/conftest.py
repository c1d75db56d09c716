"""A tiny model with a long context, for commands that run as processes."""

from __future__ import annotations

import pytest

from tests.toy import write_model


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('cli') / 'toy', max_position_embeddings=32768)
