"""What the JSON files beside a vocabulary say about it, read with types checked.

``tokenizer_config.json`` leads; ``special_tokens_map.json``, ``added_tokens.json``, ``chat_template.jinja``,
``generation_config.json`` and ``config.json`` fill in what it leaves open. All of them may be missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdeploy.errors import LoadError
from lmdeploy.tokenizer.vocabulary import AddedToken

NAMED = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')


@dataclass(slots=True)
class Settings:
    """Facts about a vocabulary that its own file does not hold; None where nothing is said.

    Attributes:
        named: special tokens by role (``'bos_token'`` ...).
        added: added tokens with the ids that the files declare.
        extra_special: further special tokens, ids unknown.
        eos_ids: end tokens of generation_config.json and config.json.
        rows: embedding rows of the model.
        origin: the file that errors about these facts name.
    """

    origin: str = ''
    named: dict[str, str] = field(default_factory=dict)
    added: list[AddedToken] = field(default_factory=list)
    extra_special: list[str] = field(default_factory=list)
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    tokenizer_class: str = ''
    chat_templates: dict[str, str] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    rows: int | None = None


def read_settings(folder: Path) -> Settings:
    """The settings of a Hugging Face model folder.

    Raises:
        LoadError: LMD-151 (not JSON), LMD-152 (a field of a wrong type).
    """
    config = _Json(folder / 'tokenizer_config.json')
    settings = Settings(origin=str(config.path))
    for source in (config, _Json(folder / 'special_tokens_map.json')):
        for name in NAMED:
            content = source.token(name)
            if content is not None:
                settings.named.setdefault(name, content)
        for name in ('additional_special_tokens', 'extra_special_tokens'):
            settings.extra_special += [t for t in source.tokens(name) if t not in settings.extra_special]
    settings.added = _added_tokens(config, _Json(folder / 'added_tokens.json'))
    settings.add_bos = config.get('add_bos_token', bool)
    settings.add_eos = config.get('add_eos_token', bool)
    settings.add_prefix_space = config.get('add_prefix_space', bool)
    settings.legacy = config.get('legacy', bool)
    settings.tokenizer_class = (config.get('tokenizer_class', str) or '').removesuffix('Fast')
    settings.chat_templates = _chat_templates(folder, config)
    generation, model = _Json(folder / 'generation_config.json'), _Json(folder / 'config.json')
    settings.eos_ids = tuple(dict.fromkeys([*generation.ids('eos_token_id'), *model.ids('eos_token_id')]))
    settings.rows = model.get('vocab_size', int)
    for nested in ('text_config', 'llm_config', 'language_config'):
        if settings.rows is None:
            settings.rows = model.below(nested).get('vocab_size', int)
    return settings


class _Json:
    """One JSON object file, whose fields are read with their types checked; a missing file has no fields."""

    def __init__(self, path: Path, data: dict[str, Any] | None = None) -> None:
        self.path = path
        self.data = _read_object(path) if data is None else data

    def bad(self, name: str, value: object, want: str) -> LoadError:
        return LoadError('LMD-152', file=self.path, field=name, value=repr(value)[:80], want=want)

    def get(self, name: str, kind: type) -> Any:
        value = self.data.get(name)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.bad(name, value, f'a {kind.__name__}')
        return value

    def below(self, name: str) -> _Json:
        return _Json(self.path, self.get(name, dict) or {})

    def token(self, name: str) -> str | None:
        """A token given as its text, or as an object with ``content``."""
        value = self.data.get(name)
        if value is None:
            return None
        content = value.get('content') if isinstance(value, dict) else value
        if not isinstance(content, str):
            raise self.bad(name, value, 'a token text or an object with content')
        return content or None

    def tokens(self, name: str) -> list[str]:
        value = self.data.get(name)
        if isinstance(value, dict):  # newer files name their extra tokens: {'image_token': '<image>'}
            return [t for key in value if (t := _Json(self.path, value).token(key)) is not None]
        values = self.get(name, list) or []
        return [t for i in range(len(values)) if (t := _Json(self.path, {name: values[i]}).token(name)) is not None]

    def ids(self, name: str) -> list[int]:
        value = self.data.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for item in values:
            if not isinstance(item, int) or isinstance(item, bool):
                raise self.bad(name, value, 'a token id or a list of token ids')
        return [item for item in values if item >= 0]  # -1 says "none" in some files


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise LoadError('LMD-151', file=path, reason=str(error)) from error
    if not isinstance(data, dict):
        raise LoadError('LMD-151', file=path, reason=f'it holds a {type(data).__name__}, not an object')
    return data


def _added_tokens(config: _Json, legacy: _Json) -> list[AddedToken]:
    """``added_tokens_decoder`` of tokenizer_config.json ({id: properties}), then added_tokens.json ({text: id})."""
    tokens = []
    for key, value in (config.get('added_tokens_decoder', dict) or {}).items():
        entry = _Json(config.path, {key: value}).below(key)
        content = entry.get('content', str)
        if content is None or not key.isascii() or not key.isdecimal():
            raise config.bad('added_tokens_decoder', {key: value}, 'a map from token ids to objects with content')
        tokens.append(AddedToken(
            content, int(key), special=bool(entry.get('special', bool)), lstrip=bool(entry.get('lstrip', bool)),
            rstrip=bool(entry.get('rstrip', bool)), normalized=bool(entry.get('normalized', bool))))
    known = {token.content for token in tokens}
    tokens += [AddedToken(content, legacy.get(content, int), special=False)
               for content in legacy.data if content not in known]
    return sorted(tokens, key=lambda token: token.id)


def _chat_templates(folder: Path, config: _Json) -> dict[str, str]:
    """Templates by name; ``'default'`` is the one for plain chats."""
    found: dict[str, str] = {}
    value = config.data.get('chat_template')
    if isinstance(value, str):
        found['default'] = value
    elif isinstance(value, list):
        for entry in value:
            named = _Json(config.path, {'chat_template': entry}).below('chat_template')
            name, text = named.get('name', str), named.get('template', str)
            if name is None or text is None:
                raise config.bad('chat_template', entry, 'an object with name and template')
            found[name] = text
    elif value is not None:
        raise config.bad('chat_template', value, 'a text or a list of named templates')
    if not found:
        text = _Json(folder / 'chat_template.json').get('chat_template', str)
        found.update({'default': text} if text else {})
    if (folder / 'chat_template.jinja').is_file():
        found['default'] = _read_text(folder / 'chat_template.jinja')
    for path in sorted((folder / 'additional_chat_templates').glob('*.jinja')):
        found[path.stem] = _read_text(path)
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except ValueError as error:
        raise LoadError('LMD-151', file=path, reason=str(error)) from error
