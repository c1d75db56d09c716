"""Text to token ids and back; the public path of ``Tokenizer`` and ``DetokenizeState``.

Names load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdeploy.tokenizer.detokenize import DetokenizeState
    from lmdeploy.tokenizer.tokenizer import Tokenizer

__all__ = ['DetokenizeState', 'Tokenizer']
_HOMES = {'DetokenizeState': 'detokenize', 'Tokenizer': 'tokenizer'}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)
