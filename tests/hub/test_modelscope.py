"""Models of ModelScope: its HTTP interface on a server of this machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lmdeploy.errors import SourceError
from lmdeploy.hub import catalog, modelscope, store
from lmdeploy.hub.resolve import resolve
from tests.hub.loopback import Answer, Loopback, Request, as_json, ranged

WEIGHTS = os.urandom(3_000_000)


class Site:
    """Speaks the two routes.

    ``repos``: (id, revision) -> name -> content. ``faults``: file name (or ``'list'``) -> answers to give first.
    """

    def __init__(self) -> None:
        self.repos = {('org/toy', 'master'): {
            'config.json': b'{"a": 1}', 'model.safetensors': WEIGHTS, 'tokenizer.json': b'{}', 'README.md': b'read me',
            'pytorch_model.bin': b'pickle', 'modeling.py': b'code', '../evil.json': b'{}', '/etc/evil.json': b'{}'}}
        self.faults: dict[str, list[Answer]] = {}
        self.hashes = True

    def __call__(self, request: Request) -> Answer | None:
        org, name, *route = request.path.removeprefix('/api/v1/models/').split('/')
        files = self.repos.get((f'{org}/{name}', request.query['Revision']))
        if route == ['repo', 'files']:
            if self.faults.get('list'):
                return self.faults['list'].pop(0)
            if files is None:
                return as_json({'Code': 10010205001, 'Message': 'record not found', 'Success': False}, 404)
            listed = [{'Type': 'tree', 'Path': 'folder', 'Name': 'folder', 'Size': 0, 'Sha256': ''}]
            listed += [{'Type': 'blob', 'Path': path, 'Name': path.rpartition('/')[2], 'Size': len(content),
                        'Sha256': hashlib.sha256(content).hexdigest() if self.hashes else ''}
                       for path, content in files.items()]
            return as_json({'Code': 200, 'Data': {'Files': listed}, 'Message': 'success', 'Success': True})
        path = request.query['FilePath']
        if self.faults.get(path):
            return self.faults[path].pop(0)
        return ranged(files[path], request) if files and path in files else None


@pytest.fixture
def site(monkeypatch, tmp_path):
    site = Site()
    with Loopback(site) as server:
        monkeypatch.setenv('MODELSCOPE_DOMAIN', server.url)
        monkeypatch.setenv('LMDEPLOY_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        monkeypatch.delenv('LMDEPLOY_USE_MODELSCOPE', raising=False)
        monkeypatch.setattr(modelscope, 'PAUSE', 0.01)
        site.server = server
        yield site


def downloads(site) -> list[str]:
    """The files that were asked for so far; forgets them."""
    asked = [path.rpartition('FilePath=')[2] for _, path in site.server.seen if 'FilePath=' in path]
    site.server.seen.clear()
    return asked


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.name != store.MANIFEST)


def test_a_model_is_fetched_once_and_only_what_is_read(site, tmp_path, capfd):
    files = resolve('ms:org/toy')
    assert (files.kind, files.origin) == ('hf', 'modelscope')
    assert names_in(files.path) == ['config.json', 'model.safetensors', 'tokenizer.json']
    assert (files.path / 'model.safetensors').read_bytes() == WEIGHTS
    assert 'org/toy: ' in capfd.readouterr().err
    assert downloads(site) == ['config.json', 'model.safetensors', 'tokenizer.json']
    assert resolve('ms:org/toy') == files and downloads(site) == []
    assert not list(tmp_path.rglob('evil*'))
    assert catalog.remove('ms:org/toy') > len(WEIGHTS) and not files.path.exists()


def test_the_environment_makes_plain_ids_mean_modelscope(site, monkeypatch):
    monkeypatch.setenv('LMDEPLOY_USE_MODELSCOPE', 'True')
    assert resolve('org/toy', progress=False).origin == 'modelscope'


def test_one_file_of_a_repository_and_a_revision(site):
    site.repos['org/quants', 'v1'] = {'a.gguf': b'GGUFa', 'sub/b.gguf': b'GGUFb', 'config.json': b'{}'}
    with pytest.raises(SourceError, match='LMD-190'):
        resolve('ms:org/quants', progress=False)
    files = resolve('ms:org/quants/sub/b.gguf', revision='v1', progress=False)
    assert files.path.read_bytes() == b'GGUFb' and files.kind == 'gguf'
    assert resolve('ms:org/quants', revision='v1', progress=False).path.read_bytes() == b'GGUFa'  # the one at the top
    with pytest.raises(SourceError, match=r'LMD-190.*c\.gguf'):
        resolve('ms:org/quants/c.gguf', revision='v1', progress=False)


def test_what_changed_is_fetched_and_the_rest_kept(site):
    old = resolve('ms:org/toy', progress=False).path
    downloads(site)
    site.repos['org/toy', 'master']['config.json'] = b'{"a": 2}'
    del site.repos['org/toy', 'master']['tokenizer.json']
    assert resolve('ms:org/toy', progress=False).path == old
    assert downloads(site) == ['config.json'] and names_in(old) == ['config.json', 'model.safetensors']
    assert (old / 'config.json').read_bytes() == b'{"a": 2}' and (old / 'model.safetensors').read_bytes() == WEIGHTS


def test_a_cut_connection_is_resumed(site):
    site.faults['model.safetensors'] = [Answer(WEIGHTS, cut=1_000_000)]
    files = resolve('ms:org/toy', progress=False)
    assert (files.path / 'model.safetensors').read_bytes() == WEIGHTS
    assert downloads(site).count('model.safetensors') == 2


def test_a_download_goes_on_in_a_later_run(site, tmp_path):
    site.faults['model.safetensors'] = [Answer(WEIGHTS, cut=1_000_000), *[Answer(status=503)] * 3]
    with pytest.raises(SourceError, match='LMD-105.*503'):
        resolve('ms:org/toy', progress=False)
    (partial,) = tmp_path.rglob('model.safetensors')
    assert 0 < partial.stat().st_size <= 1_000_000 and 'staging' in partial.parts
    head = WEIGHTS[:partial.stat().st_size]
    assert partial.read_bytes() == head
    downloads(site)
    files = resolve('ms:org/toy', progress=False)
    assert (files.path / 'model.safetensors').read_bytes() == WEIGHTS
    assert downloads(site) == ['model.safetensors', 'tokenizer.json']


def test_a_server_without_ranges_starts_afresh(site):
    site.faults['model.safetensors'] = [Answer(WEIGHTS, cut=1_000_000), Answer(WEIGHTS)]
    assert (resolve('ms:org/toy', progress=False).path / 'model.safetensors').read_bytes() == WEIGHTS


def test_a_file_that_stays_short_is_told(site):
    site.faults['model.safetensors'] = [Answer(b'x' * 100)] + [Answer(b'', 206)] * 3
    with pytest.raises(SourceError, match='LMD-199.*100 bytes arrived of 3000000'):
        resolve('ms:org/toy', progress=False)


def test_wrong_content_is_deleted(site, tmp_path):
    site.faults['model.safetensors'] = [Answer(b'?' * len(WEIGHTS))]
    with pytest.raises(SourceError, match='LMD-106'):
        resolve('ms:org/toy', progress=False)
    assert not list(tmp_path.rglob('model.safetensors'))
    assert (resolve('ms:org/toy', progress=False).path / 'model.safetensors').read_bytes() == WEIGHTS


def test_no_more_than_the_listed_bytes_are_taken(site):
    site.hashes = False
    site.faults['config.json'] = [Answer(b'{"a": 1}' + b' ' * 1_000_000)]
    assert (resolve('ms:org/toy', progress=False).path / 'config.json').read_bytes() == b'{"a": 1}'


@pytest.mark.parametrize(('answer', 'code'), [
    (Answer(status=404), 'LMD-190'), (Answer(status=401), 'LMD-191'), (Answer(status=403), 'LMD-191'),
    (Answer(status=429), 'LMD-105'), (Answer(b'<html>'), 'LMD-105'), (Answer(b'[]'), 'LMD-105'),
    (as_json({'Code': 200, 'Data': {'Files': [{'Type': 'blob'}]}}), 'LMD-105'), (as_json({'Code': 200}), 'LMD-105'),
    (as_json({'Code': 10990101, 'Message': 'the model does not exist'}), 'LMD-190'),
    (as_json({'Code': 200, 'Data': {'Files': []}}), 'LMD-103'),
])
def test_refusals(site, answer, code):
    site.faults['list'] = [answer]
    with pytest.raises(SourceError) as caught:
        resolve('ms:org/toy', progress=False)
    assert caught.value.code == code and 'org/toy' in str(caught.value)


@pytest.mark.parametrize(('files', 'code'), [
    ({'config.json': b'{}', 'pytorch_model.bin': b'x'}, 'LMD-108'), ({'a.gguf': b'GGUF', 'b.gguf': b'GGUF'}, 'LMD-195'),
    ({'config.json': b'{}'}, 'LMD-103'),
])
def test_models_that_cannot_be_used_are_not_downloaded(site, files, code):
    site.repos['org/other', 'master'] = files
    with pytest.raises(SourceError) as caught:
        resolve('ms:org/other', progress=False)
    assert caught.value.code == code and downloads(site) == []


def test_a_site_that_cannot_be_reached(site, monkeypatch):
    files = resolve('ms:org/toy', progress=False)
    monkeypatch.setenv('MODELSCOPE_DOMAIN', 'http://127.0.0.1:9')
    assert resolve('ms:org/toy', progress=False) == files  # the copy in the cache
    with pytest.raises(SourceError, match='LMD-105'):
        resolve('ms:org/other', progress=False)
