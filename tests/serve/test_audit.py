"""The audit log: one line per request, without keys and texts, rotated, never in the way."""

from __future__ import annotations

import json
import os
import time

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.serve.audit import AuditLog, Entry
from lmdeploy.serve.auth import KeyRing
from tests.serve.fake_server import CHAT, MODEL
from tests.serve.test_streams import LONG, URL, Connection, freed, run


def entry(**change) -> Entry:
    values = {'time': 't', 'request': 'r', 'key': 'k', 'client': 'c', 'method': 'GET', 'route': '/', 'model': 'm',
              'status': 200, 'outcome': 'finished', 'prompt_tokens': 1, 'output_tokens': 2, 'seconds': 0.1}
    return Entry(**values | change)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_request(serve, tmp_path):
    path = tmp_path / 'audit.jsonl'
    log = AuditLog(path, digests=True)
    server = serve(keys=KeyRing(['secret-key'], ['secret-boss']), audit=log, step_seconds=0.002)
    key = {'x-api-key': 'secret-key', 'x-request-id': 'a1'}
    assert server.post(URL, CHAT, headers=key).status_code == 200
    server.post(URL, CHAT | {'n': 0}, headers=key)
    server.post(URL, CHAT)
    server.ask('GET', '/health')
    server.ask('GET', '/v1/models%0d%0aforged', headers=key)
    server.ask('POST', '/sleep', headers=key)

    async def leave():
        connection = Connection(server, LONG | {'stream': True})
        connection.left.set()
        await connection.task
        await freed(server)

    run(leave())
    log.close()
    found = lines(path)
    assert [(one['status'], one['outcome']) for one in found[:5]] == [
        (200, 'finished'), (400, 'invalid_request'), (401, 'invalid_api_key'), (404, 'not_found'),
        (403, 'admin_key_required')]
    done = found[0]
    assert done['request'] == 'a1' and done['model'] == MODEL and done['route'] == URL and done['seconds'] > 0
    assert (done['output_tokens'], done['prompt_tokens'] > 0) == (8, True) and len(done['prompt_digest']) == 32
    assert done['key'].startswith('key-') and found[4]['key'] == done['key'] and found[2]['key'] == 'anonymous'
    text = path.read_text()
    assert 'secret' not in text and 'hello' not in text
    assert oct(os.stat(path).st_mode & 0o777) == '0o600'


def test_rotation_keeps_so_many_files(tmp_path):
    path = tmp_path / 'audit.jsonl'
    log = AuditLog(path, max_bytes=1000, keep=2)
    for i in range(40):
        log.add(entry(request=str(i)))
        while not log._lines.empty():
            time.sleep(0.001)
    log.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ['audit.jsonl', 'audit.jsonl.1', 'audit.jsonl.2']
    kept = [one['request'] for name in reversed(names) for one in lines(tmp_path / name)]
    assert kept == [str(i) for i in range(40 - len(kept), 40)]


def test_what_cannot_be_written_is_counted_and_nobody_waits(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / 'audit.jsonl')
    monkeypatch.setattr(log, '_write', lambda data: (_ for _ in ()).throw(OSError(28, 'no space left')))
    for _ in range(5):
        log.add(entry())
    log.close()
    assert log.dropped == 5
    with pytest.raises(ConfigError, match='LMD-528'):
        AuditLog(tmp_path / 'none' / 'x')


def test_texts_are_cut(tmp_path):
    log = AuditLog(tmp_path / 'a')
    log.add(entry(route='/' * 10**6, model='x' * 10**6))
    log.close()
    assert len((tmp_path / 'a').read_bytes()) < 2048
