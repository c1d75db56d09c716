"""Models on this machine: is it a folder or file that can be loaded, and if not, what did the user mean?"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import stat
from pathlib import Path
from typing import Literal

from lmdeploy.errors import SourceError
from lmdeploy.hub import names
from lmdeploy.texts.source import Phrase, phrase

ROOTS = frozenset({'Users', 'Volumes', 'autodl-tmp', 'content', 'data', 'home', 'kaggle', 'media', 'mnt', 'opt', 'root',
                   'srv', 'tmp', 'usr', 'var', 'workspace'})  # first folders that an absolute path is likely to have
MAX_NAMES = 100_000  # of a folder's entries that are looked at


def inspect(path: Path, source: str) -> tuple[Path, Literal['hf', 'gguf']]:
    """What to load from a path that exists: the folder, or the GGUF file.

    Raises:
        SourceError: LMD-103 not a model's folder, LMD-107 not a model's file, LMD-108 pickle weights only,
            LMD-195 several GGUF files, LMD-198 not readable.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _inspect_folder(path, source)
        return _inspect_file(path, mode), 'gguf'
    except OSError as error:
        raise SourceError('LMD-198', path=error.filename or path, reason=error.strerror or error) from error


def exists(path: Path) -> bool:
    """Whether something is there, even if it may not be looked into."""
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def looks_like_path(source: str) -> bool:
    """Whether a source that does not exist was meant as a path, not as the id of a hub."""
    parts = source.split('/')
    if source.startswith(('/', './', '../', '~', '.\\', '..\\')) or source.endswith('/') or source in ('.', '..'):
        return True
    if '\\' in source or re.match(r'[A-Za-z]:/', source) or parts[0] in ROOTS or os.path.isfile(parts[0]):
        return True
    if len(parts) == 1:
        return source.endswith(('.gguf', '.safetensors', *names.PICKLES))
    return len(parts) > 2 and not source.endswith('.gguf')  # a hub's id has two parts, or names a GGUF file


def refuse_missing(source: str) -> SourceError:
    """The error for a path that does not exist: LMD-101 where only its leading slash is missing, else LMD-102."""
    if forgot_slash(source):
        return SourceError('LMD-101', path=source, suggestion=f'/{source}')
    if re.match(r'[A-Za-z]:[\\/]', source) and os.name != 'nt':
        return SourceError('LMD-102', path=source, hint=phrase('windows path'))
    near = _nearest(Path(source).expanduser())
    return SourceError('LMD-102', path=source, hint=phrase('did you mean' if near else 'nothing', near=near))


def forgot_slash(source: str) -> bool:
    """Whether ``source`` is an absolute path without its first slash."""
    if source.startswith(('/', '.', '~')) or '/' not in source:
        return False
    return exists(Path(f'/{source}')) or source.split('/')[0] in ROOTS and exists(Path(f'/{source.split("/")[0]}'))


def _inspect_folder(folder: Path, source: str) -> tuple[Path, Literal['hf', 'gguf']]:
    files = []
    with os.scandir(folder) as entries:
        for entry, _ in zip(entries, range(MAX_NAMES), strict=False):
            with contextlib.suppress(OSError):  # a link that leads nowhere is no file of the model
                if entry.is_file():
                    files.append(entry.name)
    choice = names.choose(files)
    if choice.verdict == 'gguf':
        path = folder / choice.files[0]
        return _inspect_file(path, path.stat().st_mode), 'gguf'
    config = folder / 'config.json'
    if choice.verdict == 'hf' or choice.verdict == 'none' and 'config.json' in files:
        return folder, 'hf'  # without weights at all: the weights' reader names what is missing
    if exists(config) and not config.is_file():
        raise SourceError('LMD-107', path=config, reason=phrase('not regular'))
    if choice.verdict == 'none' or choice.verdict == 'pickle' and 'config.json' not in files:
        raise SourceError('LMD-103', where=folder, hint=_folder_hint(folder, files))
    names.refuse(choice, source, folder)


def _folder_hint(folder: Path, files: list[str]) -> Phrase:
    """What a folder without config.json may be instead; empty if nothing comes to mind."""
    if 'adapter_config.json' in files:
        return phrase('adapter')
    below = sorted(folder.glob('snapshots/*/config.json')) or sorted(folder.glob('*/config.json'))
    return phrase('did you mean' if below else 'nothing', near=below[-1].parent if below else '')


def _inspect_file(path: Path, mode: int) -> Path:
    if not stat.S_ISREG(mode):
        raise SourceError('LMD-107', path=path, reason=phrase('not regular'))
    if path.name.endswith(names.PICKLES):
        raise SourceError('LMD-108', where=path.parent, files=path.name)
    if not path.name.lower().endswith('.gguf'):
        raise SourceError('LMD-107', path=path, reason=phrase('not gguf name', folder=path.parent))
    if names.is_split(path.name):
        raise SourceError('LMD-107', path=path, reason=phrase('split'))
    with path.open('rb') as file:
        magic = file.read(7)
    if magic[:4] != b'GGUF':
        reason = 'lfs pointer' if magic == b'version' else 'not gguf' if magic else 'empty file'
        raise SourceError('LMD-107', path=path, reason=phrase(reason))
    return path


def _nearest(path: Path) -> str:
    """A path that exists and resembles ``path`` in its first part that does not; empty if there is none."""
    parts = path.parts
    here = Path(parts[0]) if path.is_absolute() else Path()
    for index in range(1 if path.is_absolute() else 0, len(parts)):
        if exists(here / parts[index]):
            here = here / parts[index]
            continue
        try:
            with os.scandir(here) as entries:
                siblings = [entry.name for entry, _ in zip(entries, range(MAX_NAMES), strict=False)]
        except OSError:
            return ''
        close = difflib.get_close_matches(parts[index], siblings, n=1, cutoff=0.7)
        near = Path(here, *close, *parts[index + 1:])
        return str(near) if close and exists(near) else ''
    return ''
