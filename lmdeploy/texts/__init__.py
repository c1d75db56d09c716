"""The texts of all error codes, in English and Chinese.

Each area keeps its entries in a module of its own; an entry is ``code: {lang: text}``, a text is a ``str.format``
template over the error's parameters and says what happened, why, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module

from lmdeploy.texts.fragments import PARAMS, translate

LANGUAGES = ('en', 'zh')
AREAS = ('source', 'model', 'weights', 'tokenizer', 'chat', 'resources', 'options', 'requests', 'grammar', 'engine',
         'cli', 'server', 'proxy', 'client', 'bench', 'vision', 'media', 'lite')


@cache
def table() -> dict[str, dict[str, str]]:
    """All entries, gathered on first use: ``{code: {lang: text}}``."""
    return {code: entry for area in AREAS for code, entry in import_module(f'lmdeploy.texts.{area}').TEXTS.items()}


def render(code: str, lang: str, params: Mapping[str, object]) -> str:
    """The text of ``code`` in ``lang`` (English where that language is missing) with its parameters filled in."""
    entry = table()[code]
    if lang == 'zh':
        params = {name: translate(value) if name in PARAMS and isinstance(value, str) else value
                  for name, value in params.items()}
    return entry.get(lang, entry['en']).format(**params)
