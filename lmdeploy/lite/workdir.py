"""The output folder while it is being made: files that appear whole or not at all, and a record of what is done.

Life: :meth:`WorkDir.open` makes the folder or finds an unfinished one of an equal run; every file is written beside its
name, synchronised and renamed; the manifest says which shards are done, so that a run that was killed goes on with the
next one; :meth:`WorkDir.close` takes the traces of work away. A folder is no model until config.json is there, which is
written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lmdeploy.errors import ConfigError
from lmdeploy.lite.recipe import SiteReport
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.checkpoint import Checkpoint, StoredTensor
from lmdeploy.weights.safetensors import read_header

STATE = '.lite'
MANIFEST = 'manifest.json'
REPORT = 'quant_report.json'
OURS = re.compile(r'model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|quant_report\.\w+|'
                  r'config\.json|quantize_config\.json')
CHUNK = 1 << 22


@dataclass(slots=True)
class ShardRecord:
    """One finished file of weights.

    Attributes:
        tensors: its tensors' names. bytes: of the tensors alone. sites: of a layer, by name.
    """

    file: str
    sha256: str
    bytes: int
    tensors: list[str]
    seconds: float
    sites: dict[str, SiteReport] = field(default_factory=dict)


@dataclass(slots=True)
class WorkDir:
    """See the module.

    Attributes:
        key: of the run: equal runs have equal ones.
        shards: done so far, by index: 0 is everything outside of the layers, i + 1 is layer i.
    """

    path: Path
    key: str
    shards: dict[int, ShardRecord] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, key: str, *, restart: bool = False) -> WorkDir:
        """The folder for a run.

        Raises:
            ConfigError: LMD-603 there is something else; LMD-604 another run, finished or not; LMD-605 it cannot be
                written.
        """
        try:
            found = _found_key(path)
            there = sorted(entry.name for entry in path.iterdir() if entry.name != STATE) if path.is_dir() else []
            if there and found is None:
                raise ConfigError('LMD-603', folder=path, files=', '.join(there[:5]))
            if found not in (None, key) and not restart:
                raise ConfigError('LMD-604', folder=path)
            if restart:
                _clear(path)
            (path / STATE).mkdir(parents=True, exist_ok=True)
            for name in os.listdir(path):
                if name.endswith('.tmp'):
                    (path / name).unlink()
            work = WorkDir(path, key)
            work._read()
            if not (path / STATE / MANIFEST).exists():
                work._save()
            return work
        except OSError as error:
            raise ConfigError('LMD-605', folder=path, reason=error.strerror or str(error)) from error

    @staticmethod
    def finished(path: Path, key: str) -> bool:
        """Whether an equal run has ended in this folder."""
        return (path / REPORT).is_file() and not (path / STATE / MANIFEST).exists() and _found_key(path) == key

    def write_shard(self, index: int, file: str, tensors: dict[str, Tensor], seconds: float,
                    sites: dict[str, SiteReport]) -> ShardRecord:  # fmt: skip
        """Store ``tensors`` (on the CPU, contiguous) as ``file``, and remember it."""
        from safetensors.torch import save_file

        digest = self.write(file, lambda path: save_file(tensors, path, metadata={'format': 'pt'}))
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        self.shards[index] = ShardRecord(file, digest, size, sorted(tensors), round(seconds, 3), sites)
        self._save()
        return self.shards[index]

    def write(self, name: str, fill: Callable[[Path], object]) -> str:
        """Make a file by ``fill(path beside it)``; returns its sha256."""
        target = self.path / name
        beside = target.with_name(target.name + '.tmp')
        fill(beside)
        beside.chmod(0o644)
        digest = _sync(beside)
        os.replace(beside, target)
        _sync_folder(target.parent)
        return digest

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False) + '\n'
        self.write(name, lambda path: path.write_text(text, encoding='utf-8'))

    def close(self) -> None:
        """The work is done: only the output stays."""
        (self.path / STATE / MANIFEST).unlink()
        shutil.rmtree(self.path / STATE)

    def _save(self) -> None:
        content = {'key': self.key, 'shards': {str(i): asdict(record) for i, record in sorted(self.shards.items())}}
        self.write_json(f'{STATE}/{MANIFEST}', content)

    def _read(self) -> None:
        """Take over what an earlier run finished; a shard that is not as it was written is made again."""
        try:
            content = json.loads((self.path / STATE / MANIFEST).read_text(encoding='utf-8'))
        except (OSError, ValueError):
            return
        for index, raw in content['shards'].items():
            sites = {name: SiteReport(**site) for name, site in raw.pop('sites').items()}
            record = ShardRecord(**raw, sites=sites)
            path = self.path / record.file
            if not path.is_file() or _digest(path) != record.sha256:
                break  # those after it were made from it
            self.shards[int(index)] = record


def open_shard(path: Path) -> Checkpoint:
    """The tensors of one file, read and checked as those of any model."""
    file = ByteFile(path)
    tensors = {name: StoredTensor(file, name, entry.dtype_name, entry.shape, entry.offset, entry.nbytes)
               for name, entry in read_header(file).items()}  # fmt: skip
    return Checkpoint(path, tensors, {}, {}, [file])


def _found_key(path: Path) -> str | None:
    """The key of the run that made a folder, or is making it; None: there is none."""
    for name in (f'{STATE}/{MANIFEST}', REPORT):
        try:
            return str(json.loads((path / name).read_text(encoding='utf-8'))['key'])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _clear(path: Path) -> None:
    """Delete what a run has made, and nothing else."""
    for entry in path.iterdir() if path.is_dir() else ():
        if entry.name == STATE:
            shutil.rmtree(entry)
        elif OURS.fullmatch(entry.name):
            entry.unlink()


def _sync(path: Path) -> str:
    """Make the file's content safe from a power cut; its sha256."""
    digest = _digest(path)
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
    return digest


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
