"""Texts to calibrate with: named ones, files of the user's, and what this package brings as the last resort.

A corpus is a list of documents; a document is a text or a conversation. Nothing here knows tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdeploy.errors import ConfigError
from lmdeploy.hub.datasets import HUB, Unavailable, hub_text, treebank

Conversation = list[dict[str, Any]]
Document = str | Conversation

HERE = Path(__file__).parent / 'text'
BUNDLED, MIX, PTB = 'bundled', 'mix', 'ptb'
NAMES = (MIX, PTB, 'ptb_new', *HUB, BUNDLED)
SUFFIXES = ('.txt', '.md', '.rst', '.json', '.jsonl', '.py', '.c', '.h', '.cc', '.cpp', '.java', '.js', '.ts', '.go',
            '.rs')  # fmt: skip
TEXT_KEYS = ('text', 'content', 'document')
CHAT_KEYS = ('messages', 'conversations', 'conversation')
ASKED, ANSWERED = ('instruction', 'prompt', 'question', 'query'), ('output', 'response', 'completion', 'answer')
ROLES = {'human': 'user', 'gpt': 'assistant', **{role: role for role in ('user', 'assistant', 'system', 'tool')}}
MAX_FILE = 256 << 20
CODE_FILES = 60  # source files of this package


@dataclass(slots=True)
class Corpus:
    """Documents under the name of where they really come from.

    Attributes:
        joined: what stands between two documents that share a sample.
        replaced: why it is not what was asked for; ``''``: it is.
    """

    name: str
    documents: list[Document]
    joined: str = '\n\n'
    replaced: str = ''
    parts: list[Corpus] = field(default_factory=list)


def load_corpus(wanted: str) -> Corpus:
    """The corpus of a name in NAMES, a file, or a folder; a named one that cannot be had is replaced by what can.

    Raises:
        ConfigError: LMD-607 a file that cannot be used; LMD-608 neither a name nor a path.
    """
    if wanted in NAMES:
        return _named(wanted)
    path = Path(wanted).expanduser()
    if path.exists():
        return Corpus(str(path), list(_read(path)))
    raise ConfigError('LMD-608', name=wanted, known=', '.join(NAMES))


def held_out() -> dict[str, Corpus]:
    """Texts by language on which results are judged; no calibration text is among them."""
    try:
        english = Corpus('treebank test', list(treebank('test')), '\n')
    except Unavailable as error:
        english = Corpus('bundled en', bundled('held_out_en'), replaced=str(error))
    return {'en': english, 'zh': Corpus('bundled zh', bundled('held_out_zh')),
            'code': Corpus("Python's standard library", _library())}  # fmt: skip


def bundled(name: str) -> list[Document]:
    """Paragraphs of one of this package's own texts."""
    return list((HERE / f'{name}.txt').read_text(encoding='utf-8').strip().split('\n\n'))


def _named(wanted: str) -> Corpus:
    if wanted == BUNDLED:
        return _bundle('')
    if wanted == MIX:
        english = _first(PTB, [lambda: list(treebank('train'))])
        if english.parts:
            return english
        parts = [english, Corpus('bundled en', bundled('calibration_en')),
                 Corpus('bundled zh', bundled('calibration_zh')), Corpus('bundled code', _own_code())]  # fmt: skip
        return Corpus(MIX, [], parts=parts)
    if wanted in HUB:
        try:
            return Corpus(wanted, list(hub_text(wanted)))
        except Unavailable as error:
            found = _first(PTB, [lambda: list(treebank('train'))])
            return Corpus(found.name, found.documents, found.joined, f'{wanted}: {error}', found.parts)
    return _first(wanted, [lambda: list(treebank('train'))])


def _first(name: str, ways: list[Callable[[], list[Document]]]) -> Corpus:
    reason = ''
    for way in ways:
        try:
            return Corpus(name, way(), ' ' if name == 'ptb_new' else '\n\n')
        except Unavailable as error:
            reason = str(error)
    return _bundle(reason)


def _bundle(reason: str) -> Corpus:
    parts = [Corpus(f'bundled {kind}', documents) for kind, documents in (
        ('en', bundled('calibration_en')), ('zh', bundled('calibration_zh')), ('code', _own_code()))]  # fmt: skip
    return Corpus(BUNDLED, [], replaced=reason, parts=parts)


def _own_code() -> list[Document]:
    """Source files of this package, which are always here."""
    files = sorted((HERE.parents[1]).rglob('*.py'), key=lambda path: (path.stat().st_size, path.name))
    return [path.read_text(encoding='utf-8') for path in files[-CODE_FILES:]]


def _library() -> list[Document]:
    """Modules of Python's standard library, those of a middling size first."""
    files = [path for path in Path(json.__file__).parents[1].glob('*.py') if 4_000 < path.stat().st_size < 40_000]
    return [path.read_text(encoding='utf-8', errors='replace') for path in sorted(files, key=lambda path: path.name)]


# -- files -------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob('*')) if file.is_file() and file.suffix.lower() in SUFFIXES]
        if not files:
            raise ConfigError('LMD-607', path=path, reason=f'it holds no text files ({", ".join(SUFFIXES)})')
        for file in files:
            yield from _read_file(file)
    else:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[Document]:
    try:
        if path.stat().st_size > MAX_FILE:
            raise ConfigError('LMD-607', path=path, reason=f'it has {path.stat().st_size} bytes (limit {MAX_FILE})')
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError('LMD-607', path=path, reason=str(error)) from error
    if path.suffix == '.jsonl':
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _document(path, number, line)
    elif path.suffix == '.json':
        yield from (_document(path, i, json.dumps(entry)) for i, entry in enumerate(_array(path, text), 1))
    elif text.strip():
        yield text


def _array(path: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError('LMD-607', path=path, reason=f'it is not JSON ({error})') from error
    return value if isinstance(value, list) else [value]


def _document(path: Path, number: int, line: str) -> Document:
    """One line of JSON: a text, or a conversation in one of the usual shapes."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError('LMD-607', path=f'{path}:{number}', reason=f'it is not JSON ({error})') from error
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict):
        for key in CHAT_KEYS:
            if isinstance(entry.get(key), list):
                return _conversation(path, number, entry[key])
        asked = next((entry[key] for key in ASKED if isinstance(entry.get(key), str)), None)
        answered = next((entry[key] for key in ANSWERED if isinstance(entry.get(key), str)), None)
        if asked is not None:
            more = entry.get('input')
            asked = f'{asked}\n{more}' if isinstance(more, str) and more else asked
            turns = [{'role': 'user', 'content': asked}]
            return turns if answered is None else [*turns, {'role': 'assistant', 'content': answered}]
        for key in TEXT_KEYS:
            if isinstance(entry.get(key), str):
                return entry[key]
    known = ', '.join((*CHAT_KEYS, *ASKED, *TEXT_KEYS))
    raise ConfigError('LMD-607', path=f'{path}:{number}', reason=f'it has none of the fields {known}')


def _conversation(path: Path, number: int, turns: list[Any]) -> Conversation:
    found: Conversation = []
    for turn in turns:
        role = ROLES.get(str(turn.get('role', turn.get('from')))) if isinstance(turn, dict) else None
        content = turn.get('content', turn.get('value')) if isinstance(turn, dict) else None
        if role is None or not isinstance(content, str):
            raise ConfigError('LMD-607', path=f'{path}:{number}',
                              reason='a turn needs role and content, or from and value')  # fmt: skip
        found.append({'role': role, 'content': content})
    return found
