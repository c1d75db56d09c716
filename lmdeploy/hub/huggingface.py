"""Models of the Hugging Face hub, through ``huggingface_hub`` (imported on first use) and its own, shared cache.

The library reads ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN``. The list of a repository's files is
looked at before anything is downloaded, so that a model that cannot be used costs nothing, and only the files that
will be read are fetched: never pickles, never code.
"""

from __future__ import annotations

import glob
import json
from pathlib import Path

from lmdeploy.errors import SourceError
from lmdeploy.hub import names
from lmdeploy.hub.store import require_space
from lmdeploy.log import get_logger
from lmdeploy.texts.source import phrase


def fetch(repo: str, file: str | None = None, *, revision: str | None = None, root: Path | None = None,
          progress: bool = True) -> Path:
    """The folder of the repository's snapshot, or the path of one GGUF ``file`` of it.

    Where the hub cannot be reached, a snapshot that is in the cache is used.

    Args:
        repo: ``org/name``.
        root: the hub cache's folder; None: the library's own.

    Raises:
        SourceError: LMD-103, 108, 195 not a model that can be used; LMD-105 network; LMD-190 not found; LMD-191 no
            access; LMD-192 offline; LMD-194 disk full; LMD-197 the library is missing; LMD-198 cache not writable.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError as error:
        raise SourceError('LMD-197', what=repo) from error
    # the bases are the error classes of the HTTP client that this version of the library uses
    network: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    cache = Path(constants.HF_HUB_CACHE) if root is None else root
    what = repo if revision is None else f'{repo} (revision {revision})'
    if constants.HF_HUB_OFFLINE:
        found = cached(cache, repo, file, revision)
        if found is None:
            raise SourceError('LMD-192', what=what if file is None else f'{file} of {what}')
        return found
    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return _download(repo, file, revision, cache)
    except HFValidationError as error:
        raise SourceError('LMD-109', source=repo, reason=phrase('repository id')) from error
    except network as error:
        failure = _explain(error, what if file is None else f'{file} of {what}', constants.ENDPOINT)
        found = cached(cache, repo, file, revision) if failure.code == 'LMD-105' else None
        if found is None:
            raise failure from error
        get_logger().warning('%s; using the copy in the cache', failure)
        return found
    finally:
        if quiet:
            enable_progress_bars()


def cached(cache: Path, repo: str, file: str | None, revision: str | None) -> Path | None:
    """The snapshot (or one file of it) in the library's cache, if all that will be read is there; no network."""
    folder = cache / f'models--{repo.replace("/", "--")}'
    try:
        commit = (folder / 'refs' / (revision or 'main')).read_text().strip()
    except OSError:
        commit = revision or ''  # a commit names its snapshot itself
    snapshot = folder / 'snapshots' / commit
    if not commit or not snapshot.is_dir():
        return None
    if file is not None:
        return snapshot / file if (snapshot / file).is_file() else None
    choice = names.choose(path.name for path in snapshot.iterdir() if path.is_file())
    if choice.verdict not in ('hf', 'gguf'):
        return None
    try:
        index = json.loads((snapshot / 'model.safetensors.index.json').read_text(encoding='utf-8'))
        shards = set(index['weight_map'].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shards = set()
    return snapshot if shards <= set(choice.files) else None


def _download(repo: str, file: str | None, revision: str | None, cache: Path) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or () if names.is_plain(item.rfilename)}
    if file is not None:
        wanted: tuple[str, ...] = (file,)
    else:
        choice = names.choose(sizes)
        if choice.verdict not in ('hf', 'gguf'):
            names.refuse(choice, repo, repo)
        wanted = choice.files
    missing = [name for name in wanted if not isinstance(try_to_load_from_cache(repo, name, cache, info.sha), str)]
    require_space(cache, sum(sizes.get(name, 0) for name in missing))
    if file is not None:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache))
    patterns = [glob.escape(name) for name in wanted]
    return Path(snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=patterns))


def _explain(error: Exception, what: str, site: str) -> SourceError:
    """What a failure of the library means to the user."""
    from huggingface_hub import errors

    response = getattr(error, 'response', None)
    status = None if response is None else response.status_code
    if isinstance(error, errors.GatedRepoError):
        return SourceError('LMD-191', site=site, what=what, login=phrase('log in hf'))
    if isinstance(error, errors.LocalEntryNotFoundError):  # it wanted to ask the hub for the file, and could not
        return _unreachable(what, error.__cause__ or error)
    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    if isinstance(error, missing) or status == 404:
        return SourceError('LMD-190', site=site, what=what)
    if status in (401, 403):
        return SourceError('LMD-191', site=site, what=what, login=phrase('log in hf'))
    if status is None and isinstance(error, OSError) and error.errno is not None and not isinstance(
            error, (ConnectionError, TimeoutError)):
        return SourceError('LMD-198', path=error.filename or what, reason=error.strerror or error)
    return _unreachable(what, error if status is None else f'HTTP {status}')


def _unreachable(what: str, reason: object) -> SourceError:
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return SourceError('LMD-105', what=what, reason=lines[0][:300], todo=phrase('try endpoint'))
