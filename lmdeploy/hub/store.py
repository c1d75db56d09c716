"""The model cache on disk: finished models, work in progress, and one lock per model.

Life of a model::

    <root>/staging/<key>/   files as they arrive; survives an interruption, so that a download can go on
    <root>/models/<key>/    the finished model: its files and a manifest. It appears by one rename, or not at all
    <root>/locks/<key>      held while a model is fetched or removed

Invariants: (1) a folder below ``models/`` that has a manifest is complete and was verified when it was published;
(2) only the holder of the lock writes below ``staging/<key>`` and ``models/<key>``; (3) a key is one plain file name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from lmdeploy.config import env
from lmdeploy.errors import SourceError
from lmdeploy.log import get_logger

MANIFEST = '.source.json'
CHUNK = 1 << 20
SPACE_MARGIN = 64 << 20  # bytes that stay free beyond what a download needs
LOCK_POLL = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a finished model."""

    name: str  # relative to the model's folder, with '/'
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished model consists of and where it came from."""

    source: str
    files: tuple[FileRecord, ...]

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files)


class Store:
    """The cache below one root folder.

    Args:
        root: the folder; None: :func:`lmdeploy.config.env.cache_dir`. It need not exist.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = env.cache_dir() if root is None else root

    def folder(self, key: str) -> Path:
        """Where the finished model ``key`` lies, or will lie."""
        return self.root / 'models' / key

    def staging(self, key: str) -> Path:
        """The work folder of ``key``; made if missing. Call it with the lock held."""
        folder = self.root / 'staging' / key
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of a finished model; None if there is none, or a file is missing or has another size."""
        folder = self.folder(key)
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        for record in manifest.files:
            try:
                size = (folder / record.name).stat().st_size
            except OSError:
                size = -1
            if size != record.bytes:
                get_logger().warning('%s is damaged: %s has %d bytes, not %d', folder, record.name, size, record.bytes)
                return None
        return manifest

    def publish(self, key: str, built: Path, manifest: Manifest) -> Path:
        """Move the complete folder ``built`` to its final place, replacing an older one; drop the staging folder."""
        folder = self.folder(key)
        with writing(folder):
            write_json(built / MANIFEST, asdict(manifest))
            folder.parent.mkdir(parents=True, exist_ok=True)
            old = self.staging(key) / 'replaced'
            remove_tree(old)
            if folder.exists():
                os.rename(folder, old)
            os.rename(built, folder)
            remove_tree(self.root / 'staging' / key)
        return folder

    def remove(self, key: str) -> int:
        """Delete the model and its unfinished download; returns the bytes that were freed. Takes the lock."""
        freed = 0
        with self.lock(key):
            for folder in (self.folder(key), self.root / 'staging' / key):
                freed += tree_bytes(folder)
                with writing(folder):
                    remove_tree(folder)
        return freed

    def bytes(self, key: str) -> int:
        """Bytes that the finished model takes; 0 if it is not there."""
        manifest = self.manifest(key)
        return 0 if manifest is None else manifest.bytes

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the exclusive lock of ``key``, between processes and between threads. Waits for its holder."""
        path = self.root / 'locks' / key
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = open(path, 'a+b')  # noqa: SIM115 - closed below, with the lock
        with handle:
            told = False
            while not _try_lock(handle):
                if not told:
                    get_logger().warning('%s is being fetched by another process; waiting for it', key)
                    told = True
                time.sleep(LOCK_POLL)
            try:
                yield
            finally:
                _unlock(handle)


def require_space(folder: Path, wanted: int) -> None:
    """Raise LMD-194 unless ``wanted`` bytes and a margin are free where ``folder`` lies (it is made if missing)."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if wanted > 0 and free < wanted + SPACE_MARGIN:
        raise SourceError('LMD-194', folder=folder, wanted=megabytes(wanted + SPACE_MARGIN), free=megabytes(free))


def key_of(source: str) -> str:
    """A plain file name for a source; different sources get different names, letter case aside."""
    plain = re.sub(r'[^a-z0-9._-]+', '--', source.lower()).strip('.-')
    if plain == source.lower().replace(':', '--') and len(plain) <= 96:
        return plain
    return f'{plain[:96]}--{hashlib.sha256(source.encode()).hexdigest()[:8]}'


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in ``folder``; None if it is missing or not readable as one."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))
        files = tuple(FileRecord(str(item['name']), int(item['bytes']), str(item['sha256'])) for item in raw['files'])
        return Manifest(str(raw['source']), files) if files else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` so that a reader sees the old or the new file, never half of one."""
    fresh = path.with_name(f'{path.name}.new')
    fresh.write_text(json.dumps(value, indent=1), encoding='utf-8')
    os.replace(fresh, path)


def sha256_of(path: Path, length: int | None = None) -> hashlib._Hash:
    """The running digest of the first ``length`` bytes of a file (None: all of it)."""
    digest = hashlib.sha256()
    left = path.stat().st_size if length is None else length
    with path.open('rb') as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``; 0 if it does not exist."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def remove_tree(folder: Path) -> None:
    """Delete a folder with all it holds; nothing happens if it does not exist."""
    if folder.exists():
        shutil.rmtree(folder)


def megabytes(count: int) -> str:
    """``count`` bytes for people: ``'98.4 MB'``."""
    return f'{count / 1e9:.2f} GB' if count >= 1e9 else f'{count / 1e6:.1f} MB'


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the file system into LMD-198 (a full disk, a read-only folder, no permission)."""
    try:
        yield
    except OSError as error:
        raise SourceError('LMD-198', path=error.filename or path, reason=error.strerror or error) from error


try:
    import fcntl

    def _try_lock(handle: IO[bytes]) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)

except ImportError:  # Windows
    import msvcrt

    def _try_lock(handle: IO[bytes]) -> bool:
        handle.seek(0)
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True

    def _unlock(handle: IO[bytes]) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
