"""How a model folder says that its hidden states are pooled: the files of the sentence-transformers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmdeploy.config.encoder import Pooling
from lmdeploy.errors import LoadError
from lmdeploy.weights.folder import check_inside, read_json


def read_pooling(folder: Path) -> Pooling:
    """The pooling of a folder; the mean at length 1 if it says nothing.

    Raises:
        LoadError: LMD-122, LMD-128: a file of it is damaged or lies elsewhere.
        ConfigError: LMD-115: it asks for a module or a way of pooling that is not here.
    """
    modules = _modules(folder / 'modules.json')
    pooling: dict[str, Any] = {}
    for module in modules:
        if str(module.get('type', '')).endswith('.Pooling'):
            name = module.get('path')
            if not isinstance(name, str) or not name or Path(name).name != name or name == '..':
                raise LoadError('LMD-122', file=folder / 'modules.json', reason=f'{name!r:.80} is no folder beside it')
            pooling = read_json(folder / name / 'config.json')
    return Pooling.from_modules(modules, pooling, read_json(folder / 'sentence_bert_config.json', required=False))


def _modules(path: Path) -> list[dict[str, Any]]:
    """modules.json is a list, unlike all other files of a folder."""
    if not path.exists():
        return []
    check_inside(path)
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise LoadError('LMD-122', file=path, reason=f'it is not JSON ({error})') from None
    if not isinstance(value, list) or not all(isinstance(module, dict) for module in value):
        raise LoadError('LMD-122', file=path, reason='it is not a list of JSON objects')
    return value
