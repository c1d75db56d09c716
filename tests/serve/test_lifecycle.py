"""Ports, TLS files, a load that fails."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest
import requests

from lmdeploy.errors import BindError, ConfigError, LoadError
from lmdeploy.serve.lifecycle import Watcher, bind, is_loopback, tls_context
from lmdeploy.serve.lifecycle import serve as run_server
from tests.serve.live import live

NOBODY = Watcher(ready=lambda: None, stats=lambda line: None, draining=lambda: None)


def test_a_busy_port_is_found_and_its_owner_named():
    with bind('127.0.0.1', 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(BindError) as caught:
            bind('127.0.0.1', port)
        assert caught.value.code == 'LMD-501' and str(port) in str(caught.value)
        if os.path.isdir('/proc/self/fd'):
            assert f'by process {os.getpid()}' in str(caught.value)


@pytest.mark.parametrize(('host', 'port'), [('127.0.0.1', 70000), ('127.0.0.1', -1), ('no.such.host.invalid', 0),
                                            ('192.0.2.1', 0)])
def test_addresses_that_cannot_be_had(host, port):
    with pytest.raises(BindError, match='LMD-502'):
        bind(host, port).close()


def test_loopback():
    with bind('127.0.0.1', 0) as sock:
        assert is_loopback(sock)
    with bind('0.0.0.0', 0) as sock:
        assert not is_loopback(sock)


def test_tls_files_are_checked(tmp_path):
    (tmp_path / 'key.pem').write_text('nonsense')
    for files in ((None, None), ('/none', '/none'), (str(tmp_path / 'key.pem'),) * 2):
        with pytest.raises(ConfigError, match='LMD-503'):
            tls_context(*files)


def test_health_answers_while_the_model_loads_and_a_failed_load_ends_the_server(serve):
    server = serve()

    async def main():
        sock = bind('127.0.0.1', 0)
        port, asked = sock.getsockname()[1], []

        async def load():
            for _ in range(100):
                try:
                    asked.append(await asyncio.to_thread(requests.get, f'http://127.0.0.1:{port}/health', timeout=5))
                    break
                except requests.ConnectionError:
                    await asyncio.sleep(0.05)
            raise LoadError('LMD-126', path='x', reason='y', tensor='z', wanted='w', found='f', file='g')

        with pytest.raises(LoadError):
            await asyncio.wait_for(run_server(server.app, sock, load, NOBODY), 20)
        assert asked[0].status_code == 200
        with pytest.raises(OSError):
            socket.create_connection(('127.0.0.1', port), timeout=1)

    asyncio.run(main())


def test_the_stats_line_tells_of_activity_only(serve, monkeypatch):
    monkeypatch.setattr('lmdeploy.serve.lifecycle.STATS_SECONDS', 0.2)
    import time

    server = serve()
    with live(server) as running:
        time.sleep(0.5)
        assert running.told == []
        body = {'model': server.context.model_names[0], 'prompt': 'a', 'max_tokens': 5}
        assert requests.post(f'{running.url}/v1/completions', json=body, timeout=5).status_code == 200
        time.sleep(0.5)
        assert len(running.told) == 1 and 'finished 1' in running.told[0]
