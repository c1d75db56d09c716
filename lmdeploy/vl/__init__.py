"""Pictures on their way to a model: loading, preparing, and where they stand in a prompt."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy.vl.load import load_image
    from lmdeploy.vl.video import load_video

_HOMES = {'load_image': 'lmdeploy.vl.load', 'load_video': 'lmdeploy.vl.video'}

__all__ = ['load_image', 'load_video']


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(home), name)
    return value
