"""What the names of a model's files tell: which to take, and which models cannot be used. No file is opened here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn

from lmdeploy.errors import SourceError
from lmdeploy.texts.source import phrase

Verdict = Literal['hf', 'gguf', 'several', 'pickle', 'none']
PART = re.compile(r'[A-Za-z0-9._-]{1,96}')
REVISION = re.compile(r'[A-Za-z0-9._/-]{1,128}')
PICKLES = ('.bin', '.pth', '.pt', '.ckpt', '.pkl')
TEXTS = ('tokenizer.model', 'vocab.txt', 'merges.txt')
SHOWN = 6  # file names that a message lists


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of a model to take.

    ``verdict``: ``'hf'`` and ``'gguf'`` can be loaded from ``files``; ``'several'`` GGUF files wait for the
    user's choice; ``'pickle'`` weights are refused; ``'none'``: no model here.
    """

    verdict: Verdict
    files: tuple[str, ...]


def choose(names: Iterable[str]) -> Choice:
    """Choose from all the file names of a folder or repository (relative, with '/').

    Safetensors with a config.json win over GGUF files. Weights are taken from the top folder only: others hold a second
    copy in another format. Names that come from outside must have passed :func:`is_plain`.
    """
    names = sorted(names)
    top = [name for name in names if '/' not in name]
    tensors = [name for name in top if name.endswith('.safetensors')]
    if any(not name.startswith('consolidated') for name in tensors):  # Mistral's repositories hold the weights twice
        tensors = [name for name in tensors if not name.startswith('consolidated')]
    if tensors and 'config.json' in top:
        about = [name for name in names if name.count('/') <= 1 and _describes(name)]
        return Choice('hf', tuple(sorted(about + tensors)))
    ggufs = [name for name in top if name.endswith('.gguf')] or [name for name in names if name.endswith('.gguf')]
    if ggufs:
        return Choice('gguf' if len(ggufs) == 1 and not is_split(ggufs[0]) else 'several', tuple(ggufs))
    pickles = tuple(name for name in names if name.endswith(PICKLES) and name != 'training_args.bin')
    return Choice('pickle', pickles) if pickles else Choice('none', ())


def refuse(choice: Choice, source: str, where: object) -> NoReturn:
    """Raise what a choice without a usable model means.

    Args:
        source: as the user typed it.
        where: the folder or repository that was looked at.
    """
    if choice.verdict == 'pickle':
        raise SourceError('LMD-108', where=where, files=listed(choice.files))
    if choice.verdict == 'several':
        raise SourceError('LMD-195', where=where, files=listed(choice.files),
                          example=f'{source.rstrip("/")}/{choice.files[0]}')
    raise SourceError('LMD-103', where=where, hint=phrase('nothing'))


def is_plain(name: str) -> bool:
    """Whether a relative name has only plain parts and stays below its folder."""
    return all(PART.fullmatch(part) and '..' not in part and part != '.' for part in name.split('/'))


def is_revision(revision: str | None) -> bool:
    """Whether ``revision`` is None or can be a branch, tag or commit."""
    return revision is None or isinstance(revision, str) and REVISION.fullmatch(revision) is not None and (
        '..' not in revision)


def is_split(name: str) -> bool:
    """Whether a GGUF file is one piece of several (``...-00001-of-00003.gguf``)."""
    return re.search(r'-\d{5}-of-\d{5}\.gguf$', name) is not None


def listed(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = list(names)
    more = len(names) - SHOWN
    return ', '.join(names[:SHOWN]) + (f' (+{more})' if more > 0 else '')


def _describes(name: str) -> bool:
    """Whether a file is a small part of the description: configs, vocabularies, chat templates."""
    last = name.rpartition('/')[2]
    return last.endswith(('.json', '.jinja')) or last in TEXTS
