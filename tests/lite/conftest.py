"""A tiny model and a text, for runs that take a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.hub.datasets import Unavailable
from lmdeploy.lite import corpora
from tests.toy import TEXT, write_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No package index and no hub."""
    def nothing(name: str) -> list[str]:
        raise Unavailable('there is no network')

    monkeypatch.setattr(corpora, 'treebank', nothing)
    monkeypatch.setattr(corpora, 'hub_text', nothing)


@pytest.fixture(scope='session')
def toy(tmp_path_factory) -> Path:
    """Random weights of widths that groups of 32 divide."""
    return write_model(tmp_path_factory.mktemp('lite') / 'toy', head_dim=16)


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> Path:
    """A calibration text."""
    path = tmp_path_factory.mktemp('lite') / 'text.txt'
    path.write_text('\n\n'.join(TEXT * 20), encoding='utf-8')
    return path
