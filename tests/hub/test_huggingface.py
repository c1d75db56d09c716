"""Models of the Hugging Face hub: the real huggingface_hub against a server of this machine that speaks its interface.

The library reads its environment when it is imported, so every test resolves in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy.hub.huggingface import cached
from tests.hub.loopback import Answer, Loopback, Request, as_json, ranged

COMMIT = 'c0ffee' + '0' * 34
WEIGHTS = os.urandom(300_000)
ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys
from lmdeploy.errors import SourceError
from lmdeploy.hub.resolve import resolve
for source, revision in json.load(sys.stdin):
    try:
        files = resolve(source, revision=revision, progress=False)
        print(json.dumps({'path': str(files.path), 'kind': files.kind, 'origin': files.origin}))
    except SourceError as error:
        print(json.dumps({'code': error.code, 'text': str(error)}))
"""


class Hub:
    """``repos``: id -> name -> content. ``refusals``: id -> (status, the hub's own error code)."""

    def __init__(self) -> None:
        self.repos = {
            'org/toy': {'config.json': b'{}', 'model.safetensors': WEIGHTS, 'tokenizer.json': b'{"t": 1}',
                        'chat_template.jinja': b'{{ messages }}', 'README.md': b'#', 'pytorch_model.bin': b'pickle',
                        'modeling_toy.py': b'code', 'original/model.safetensors': b'twice', 'onnx/model.onnx': b'onnx'},
            'org/quants': {'a.gguf': b'GGUFa', 'deep/b.gguf': b'GGUFb'},
            'org/several': {'a.gguf': b'GGUFa', 'b.gguf': b'GGUFb'},
            'org/pickle': {'config.json': b'{}', 'pytorch_model.bin': b'pickle'},
            'org/data': {'README.md': b'#'},
        }
        self.refusals = {'org/gated': (403, 'GatedRepo'), 'org/secret': (401, 'RepoNotFound'), 'org/broken': (500, '')}

    def __call__(self, request: Request) -> Answer | None:
        parts = request.path.strip('/').split('/')
        repo = '/'.join(parts[2:4] if parts[0] == 'api' else parts[:2])
        if repo in self.refusals:
            status, code = self.refusals[repo]
            return Answer(status=status, headers={'X-Error-Code': code, 'X-Error-Message': 'refused'} if code else {})
        files = self.repos.get(repo)
        if files is None:
            return Answer(status=404, headers={'X-Error-Code': 'RepoNotFound'})
        if parts[0] != 'api':
            return self.file(files, '/'.join(parts[4:]), request)
        if len(parts) > 5 and parts[5] not in ('main', 'v1', COMMIT):
            return Answer(status=404, headers={'X-Error-Code': 'RevisionNotFound'})
        if parts[4:5] == ['tree']:
            return as_json([{'type': 'file', 'path': name, 'size': len(content), 'oid': self.etag(content)}
                            for name, content in files.items()])
        siblings = [{'rfilename': name, 'size': len(content), 'blobId': self.etag(content)}
                    for name, content in files.items()]
        return as_json({'_id': '1', 'id': repo, 'sha': COMMIT, 'private': False, 'siblings': siblings})

    def file(self, files: dict[str, bytes], name: str, request: Request) -> Answer:
        if name not in files:
            return Answer(status=404, headers={'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': COMMIT})
        answer = ranged(files[name], request)
        answer.headers |= {'ETag': f'"{self.etag(files[name])}"', 'X-Repo-Commit': COMMIT, 'Accept-Ranges': 'bytes'}
        return answer

    @staticmethod
    def etag(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub():
    with Loopback(Hub()) as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """``run(*sources, **environment)``: what each source resolved to, in one new process."""
    def run(*sources: str | tuple[str, str], **environment: str) -> list[dict]:
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(('HF_', 'HUGGING', 'LMDEPLOY_'))}
        env = {**kept, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_DISABLE_TELEMETRY': '1',
               'HF_HUB_DISABLE_IMPLICIT_TOKEN': '1', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1', **environment}
        asked = json.dumps([source if isinstance(source, tuple) else (source, None) for source in sources])
        done = subprocess.run([sys.executable, '-c', CHILD], input=asked, cwd=ROOT, env=env, capture_output=True,
                              text=True, timeout=90, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def names_in(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob('*') if path.is_file())


def test_a_model_is_fetched_and_then_used_without_the_network(hub, run):
    (first,) = run('org/toy')
    assert (first['kind'], first['origin']) == ('hf', 'hub')
    assert names_in(first['path']) == ['chat_template.jinja', 'config.json', 'model.safetensors', 'tokenizer.json']
    assert (Path(first['path']) / 'model.safetensors').read_bytes() == WEIGHTS
    hub.seen.clear()
    same, again = run('org/toy', 'hf:org/toy')
    assert same == again == first
    assert not any('/resolve/' in path for method, path in hub.seen if method == 'GET')  # no file twice

    hub.seen.clear()
    offline, missing, file = run('org/toy', 'org/other', 'org/other/x.gguf', HF_HUB_OFFLINE='1')
    assert offline == first and hub.seen == []
    assert missing['code'] == file['code'] == 'LMD-192' and 'HF_HUB_OFFLINE' in missing['text']
    unreachable, nothing = run('org/toy', 'org/other', HF_ENDPOINT='http://127.0.0.1:9')
    assert unreachable == first
    assert nothing['code'] == 'LMD-105' and 'HF_ENDPOINT' in nothing['text']


def test_gguf_files_and_revisions(hub, run):
    one, deep, none, versions, commit = run('org/quants', 'org/quants/deep/b.gguf', 'org/quants/c.gguf',
                                            ('org/toy', 'v1'), ('org/quants/a.gguf', COMMIT))
    assert Path(one['path']).read_bytes() == Path(commit['path']).read_bytes() == b'GGUFa' and one['kind'] == 'gguf'
    assert Path(deep['path']).read_bytes() == b'GGUFb'
    assert none['code'] == 'LMD-190' and 'c.gguf' in none['text']
    assert versions['kind'] == 'hf'


def test_what_cannot_be_used_says_why_before_any_download(hub, run):
    sources = {'org/several': 'LMD-195', 'org/pickle': 'LMD-108', 'org/data': 'LMD-103', 'org/missing': 'LMD-190',
               'org/secret': 'LMD-190', 'org/gated': 'LMD-191', 'org/broken': 'LMD-105', 'org/--': 'LMD-109'}
    results = run(*sources, ('org/toy', 'no-such-branch'))
    assert {source: result['code'] for source, result in zip(sources, results[:-1], strict=True)} == sources
    assert results[-1]['code'] == 'LMD-190' and 'no-such-branch' in results[-1]['text']
    assert 'org/several/a.gguf' in results[0]['text'] and 'HF_TOKEN' in results[5]['text']
    assert not any('/resolve/' in path for _, path in hub.seen)


def test_a_cached_snapshot_counts_only_if_it_is_whole(tmp_path):
    folder = tmp_path / 'models--org--toy'
    snapshot = folder / 'snapshots' / COMMIT
    snapshot.mkdir(parents=True)
    (folder / 'refs').mkdir()
    assert cached(tmp_path, 'org/toy', None, None) is None
    (folder / 'refs/main').write_text(COMMIT)
    assert cached(tmp_path, 'org/toy', None, None) is None
    (snapshot / 'config.json').write_text('{}')
    assert cached(tmp_path, 'org/toy', None, None) is None
    index = {'weight_map': {'a': 'model-00001-of-00002.safetensors', 'b': 'model-00002-of-00002.safetensors'}}
    (snapshot / 'model.safetensors.index.json').write_text(json.dumps(index))
    (snapshot / 'model-00001-of-00002.safetensors').write_bytes(b'')
    assert cached(tmp_path, 'org/toy', None, None) is None
    (snapshot / 'model-00002-of-00002.safetensors').write_bytes(b'')
    assert cached(tmp_path, 'org/toy', None, None) == cached(tmp_path, 'org/toy', None, COMMIT) == snapshot
    assert cached(tmp_path, 'org/toy', None, 'v2') is None
    assert cached(tmp_path, 'org/toy', 'x.gguf', None) is None
