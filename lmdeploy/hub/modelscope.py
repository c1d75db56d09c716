"""Models of ModelScope, by a small client of its HTTP interface (no package needed).

Two routes below ``<site>/api/v1/models/<org>/<name>``: ``repo/files`` lists a revision, ``repo`` delivers a file and
resumes with ``Range``. A file that was cut off goes on where it stopped, also in a later process; every file is checked
against the size, and the sha256 if the list has one, before the model appears in the cache.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy.config import env
from lmdeploy.errors import SourceError
from lmdeploy.hub import names, store
from lmdeploy.hub.progress import progress_of, shifted
from lmdeploy.hub.store import FileRecord, Manifest, Store
from lmdeploy.log import get_logger
from lmdeploy.texts.source import phrase
from lmdeploy.version import __version__

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 4
PAUSE = 0.5  # seconds before the second attempt; doubles
MAX_LIST = 16 << 20  # bytes of a list of files
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository; ``sha256`` is empty where the site does not tell it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A revision of a model on a site."""

    site: str  # base URL
    id: str  # org/name
    revision: str

    def __str__(self) -> str:
        return self.id if self.revision == 'master' else f'{self.id} (revision {self.revision})'

    def url(self, route: str, **query: str) -> str:
        """Address of a route below the repository, at this revision."""
        arguments = urllib.parse.urlencode({'Revision': self.revision, **query})
        return f'{self.site}/api/v1/models/{self.id}/{route}?{arguments}'


def fetch(repo: str, file: str | None = None, *, revision: str | None = None, root: Path | None = None,
          progress: bool = True) -> Path:
    """The model's folder, or the path of one GGUF ``file`` of it; asks the site whether the copy here is current.

    Where the site cannot be reached, a copy that is in the cache is used.

    Args:
        repo: ``org/name``.
        root: the cache's folder; None: the usual one.

    Raises:
        SourceError: LMD-103, 108, 195 not a model that can be used; LMD-105 network; LMD-106 wrong content; LMD-190 not
            found; LMD-191 no access; LMD-194 disk full; LMD-198 cache not writable; LMD-199 truncated.
    """
    where = Repository(env.modelscope_endpoint(), repo, revision or 'master')
    source = f'ms:{repo}' + (f'/{file}' if file else '') + (f'@{revision}' if revision else '')
    disk, key = Store(root), store.key_of(source)
    folder = disk.folder(key)
    with disk.lock(key):
        manifest = disk.manifest(key)
        try:
            wanted = _choose(where, file)
        except SourceError as error:
            if manifest is None or error.code != 'LMD-105':
                raise
            get_logger().warning('%s; using the copy in the cache', error)
        else:
            if manifest is None or not _current(manifest, wanted):
                built = disk.staging(key) / 'model'
                records = _download(where, wanted, built, folder, manifest, progress)
                disk.publish(key, built, Manifest(source, records))
    return folder if file is None else folder / file


def listing(where: Repository) -> list[RemoteFile]:
    """The files of a repository whose names are plain."""
    url = where.url('repo/files', Recursive='True')
    body = _retried(where, lambda: _read(url))
    try:
        answer = json.loads(body)
        if answer['Code'] != 200:
            raise _refusal(where, int(answer['Code']), str(answer.get('Message', '')))
        return [RemoteFile(item['Path'], int(item['Size']), str(item.get('Sha256') or '').lower())
                for item in answer['Data']['Files'] if item['Type'] == 'blob' and names.is_plain(item['Path'])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreachable(where, f'{where.site} did not answer as ModelScope does') from error


def _choose(where: Repository, file: str | None) -> list[RemoteFile]:
    """The files to fetch, in the order of their names."""
    files = {item.name: item for item in listing(where)}
    if file is not None:
        if file not in files:
            raise SourceError('LMD-190', site=where.site, what=f'{file} of {where}')
        return [files[file]]
    choice = names.choose(files)
    if choice.verdict not in ('hf', 'gguf'):
        names.refuse(choice, f'ms:{where.id}', where)
    return [files[name] for name in choice.files]


def _current(manifest: Manifest, wanted: list[RemoteFile]) -> bool:
    """Whether a copy is the very files that the site lists now."""
    return len(manifest.files) == len(wanted) and all(_fits(record, item) for record, item in
                                                      zip(manifest.files, wanted, strict=True))


def _fits(record: FileRecord, item: RemoteFile) -> bool:
    return (record.name, record.bytes) == (item.name, item.bytes) and item.sha256 in ('', record.sha256)


def _download(where: Repository, wanted: list[RemoteFile], built: Path, old: Path, manifest: Manifest | None,
              progress: bool) -> tuple[FileRecord, ...]:
    """Fill ``built`` with the wanted files; those that an older copy in ``old`` has are linked, not fetched."""
    kept = {record.name: record for record in manifest.files} if manifest is not None else {}
    records = []
    total = sum(item.bytes for item in wanted)
    with store.writing(built):
        built.mkdir(exist_ok=True)
        store.require_space(built, total - store.tree_bytes(built))
        done = 0
        with progress_of(where.id, total, progress) as shown:
            for item in wanted:
                path = built / item.name
                path.parent.mkdir(parents=True, exist_ok=True)
                if item.name in kept and _fits(kept[item.name], item) and item.sha256:
                    records.append(kept[item.name])
                    _link(old / item.name, path)
                else:
                    _fetch_file(where, item, path, shifted(shown, done))
                    records.append(_checked(where, item, path))
                done += item.bytes
                shown.at(done)
        expected = {built / item.name for item in wanted}
        for path in built.rglob('*'):  # left by an interrupted download of another state of the repository
            if path.is_file() and path not in expected:
                path.unlink()
    return tuple(records)


def _fetch_file(where: Repository, item: RemoteFile, path: Path, arrived: Callable[[int], None]) -> None:
    """Bring ``path`` to its full size; what is there already is not fetched again."""
    url = where.url('repo', FilePath=item.name)
    if not item.sha256:  # then nobody could tell whether an older beginning belongs to this file
        path.unlink(missing_ok=True)

    def attempt() -> None:
        have = path.stat().st_size if path.exists() else 0
        if have > item.bytes:
            path.unlink()
            have = 0
        if have < item.bytes or item.bytes == 0:
            with _open(url, {'Range': f'bytes={have}-'} if have else {}) as answer, path.open('ab') as file:
                if have and answer.status != 206:  # the whole file comes
                    file.truncate(0)
                    have = 0
                while have < item.bytes and (chunk := answer.read(min(store.CHUNK, item.bytes - have))):
                    file.write(chunk)
                    have += len(chunk)
                    arrived(have)
            if have < item.bytes:
                raise http.client.IncompleteRead(b'', item.bytes - have)

    try:
        _retried(where, attempt)
    except SourceError as error:
        if isinstance(error.__cause__, http.client.IncompleteRead):
            found = path.stat().st_size if path.exists() else 0
            raise SourceError('LMD-199', what=f'{item.name} of {where}', wanted=item.bytes, found=found) from error
        raise


def _checked(where: Repository, item: RemoteFile, path: Path) -> FileRecord:
    """The record of a file that has arrived; a wrong one is deleted."""
    found = store.sha256_of(path).hexdigest()
    if item.sha256 not in ('', found):
        path.unlink()
        raise SourceError('LMD-106', what=f'{item.name} of {where}', found=found, wanted=item.sha256)
    return FileRecord(item.name, item.bytes, found)


def _link(old: Path, new: Path) -> None:
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:  # a file system without links
        shutil.copyfile(old, new)


def _open(url: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers={'User-Agent': f'lmdeploy/{__version__}', **headers})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _read(url: str) -> bytes:
    with _open(url, {}) as answer:
        return answer.read(MAX_LIST)


def _retried(where: Repository, action: Callable[[], Any]) -> Any:
    """``action()``, again after a pause while the network fails; refusals of the site are final."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 or attempt == ATTEMPTS - 1:
                raise _refusal(where, error.code, str(error.reason)) from error
        except NETWORK as error:
            if attempt == ATTEMPTS - 1 or _is_final(error):
                raise _unreachable(where, getattr(error, 'reason', None) or error) from error
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError('unreachable: the last attempt returns or raises')


def _is_final(error: Exception) -> bool:
    """Whether waiting will not help: nobody answers at that address."""
    reason = getattr(error, 'reason', error)
    return isinstance(reason, (ConnectionRefusedError, socket.gaierror))


def _refusal(where: Repository, status: int, message: str) -> SourceError:
    if status in (401, 403):
        return SourceError('LMD-191', site=where.site, what=where, login=phrase('log in ms'))
    if status == 404 or re.search(r'not (exist|found)', message, re.IGNORECASE):
        return SourceError('LMD-190', site=where.site, what=where)
    return _unreachable(where, f'HTTP {status} {message}'.strip()[:300])


def _unreachable(where: Repository, reason: object) -> SourceError:
    return SourceError('LMD-105', what=where, reason=reason, todo=phrase('try hub'))
