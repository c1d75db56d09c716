"""Tiny models, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import make_tiny


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """``tiny(arch, **overrides)`` is the folder of such a model; made at the first call."""
    base = tmp_path_factory.mktemp('tiny')
    made: dict[str, Path] = {}

    def get(arch: str, **overrides: Any) -> Path:
        key = f'{arch} {sorted(overrides.items())}'
        if key not in made:
            made[key] = make_tiny(arch, base / str(len(made)), **overrides)
        return made[key]

    return get
