"""A real proxy and two real servers, as processes, with the real client of OpenAI; one of the servers is killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import requests

from tests.toy import write_model

ROOT = Path(__file__).resolve().parents[3]
KEY = 'the-node-key'
MESSAGES = [{'role': 'user', 'content': 'hello'}]


@dataclass
class Process:
    """A command that runs, and what it has printed."""

    popen: subprocess.Popen
    log: Path

    def wait_for(self, text: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while True:
            said = self.log.read_text()
            found = re.search(text, said)
            if found:
                return found[found.lastindex or 0]
            assert self.popen.poll() is None and time.monotonic() < end, said
            time.sleep(0.05)


@contextmanager
def lmdeploy(folder: Path, name: str, *argv: str, key: str = KEY) -> Iterator[Process]:
    log = folder / f'{name}.log'
    with log.open('w') as out:
        popen = subprocess.Popen(
            [sys.executable, '-m', 'lmdeploy', 'serve', *argv, '--server-port', '0'], stdin=subprocess.DEVNULL,
            stdout=out, stderr=out, cwd=folder,
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'LMDEPLOY_LANG': 'en',
                 'LMDEPLOY_NODE_KEY': key, 'LMDEPLOY_CACHE': str(folder)})
        try:
            yield Process(popen, log)
        finally:
            if popen.poll() is None:
                popen.kill()
            popen.wait(30)


@pytest.fixture(scope='module')
def fleet(tmp_path_factory):
    """``(URL of the proxy, its process, {URL: process of a server})``."""
    folder = tmp_path_factory.mktemp('fleet')
    model = write_model(folder / 'toy', max_position_embeddings=4096)
    with ExitStack() as stack:
        proxy = stack.enter_context(lmdeploy(folder, 'proxy', 'proxy', '--api-keys', 'client-key',
                                             '--heartbeat-seconds', '1', '--log-level', 'INFO'))
        url = proxy.wait_for(r'ready at (http://127.0.0.1:\d+)')
        servers = [stack.enter_context(lmdeploy(
            folder, name, 'api_server', str(model), '--model-name', 'toy', '--proxy-url', url, '--device', 'cpu',
            '--api-keys', f'key-of-{name}', '--log-level', 'INFO')) for name in ('one', 'two')]
        nodes = {server.wait_for(r'Registered at the proxy \S+ as\s+(http://127.0.0.1:\d+)\.'): server
                 for server in servers}
        yield url, proxy, nodes


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(api_key='client-key', base_url=f'{url}/v1', max_retries=0, timeout=60)


def status(url: str) -> dict:
    return requests.get(f'{url}/nodes/status', headers={'Authorization': f'Bearer {KEY}'}, timeout=10).json()


def test_both_servers_answer_alike_and_know_no_client_key(fleet):
    url, _, nodes = fleet
    assert set(status(url)) == set(nodes)
    api = client(url)
    assert [model.id for model in api.models.list()] == ['toy']
    answers = {api.chat.completions.create(model='toy', messages=MESSAGES, max_tokens=20, temperature=0)
               .choices[0].message.content for _ in range(10)}
    text = ''.join(chunk.choices[0].delta.content or '' for chunk in api.chat.completions.create(
        model='toy', messages=MESSAGES, max_tokens=20, temperature=0, stream=True))
    assert answers == {text}
    served = [node['served'] for node in status(url).values()]
    assert sum(served) == 11 and all(served)
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key=KEY).models.list()  # the key of nodes is none for answers
    with pytest.raises(openai.BadRequestError, match='max_tokens'):
        api.chat.completions.create(model='toy', messages=MESSAGES, max_tokens=-1)
    for server in nodes.values():
        said = server.log.read_text()
        assert 'client-key' not in said and re.search(r'200 proxy-[0-9a-f]{12} ', said)


def test_the_servers_refuse_the_keys_of_others(fleet):
    url, _, nodes = fleet
    for node in nodes:
        for key in ('client-key', KEY):
            found = requests.get(f'{node}/v1/models', timeout=10, headers={'Authorization': f'Bearer {key}',
                                                                           'x-lmdeploy-caller': 'key-1'})
            assert found.status_code == 401
    for path in ('status', 'terminate_all'):
        found = requests.get(f'{url}/nodes/{path}', headers={'Authorization': 'Bearer client-key'}, timeout=10)
        assert found.status_code == 401 and found.json()['error']['code'] == 'invalid_node_key'


def test_a_server_that_is_killed(fleet):
    """In the middle of an answer its client gets an error; who has seen nothing yet is answered by the other."""
    url, _, nodes = fleet
    api = client(url)
    long = {'model': 'toy', 'messages': MESSAGES, 'max_tokens': 1000, 'extra_body': {'ignore_eos': True}}
    streams = [api.chat.completions.create(stream=True, **long) for _ in range(2)]
    for stream in streams:
        next(stream)
    assert [node['unfinished'] for node in status(url).values()] == [1, 1]  # the quieter one each time
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(api.chat.completions.create, **long) for _ in range(2)]
        end = time.monotonic() + 10
        while [node['unfinished'] for node in status(url).values()] != [2, 2]:
            assert time.monotonic() < end
            time.sleep(0.01)
        check_kill(url, nodes, api, streams, waiting)


def check_kill(url, nodes, api, streams, waiting):
    killed, other = nodes
    os.kill(nodes[killed].popen.pid, signal.SIGKILL)
    ends = []
    for stream in streams:
        try:
            *_, last = stream
            ends.append(last.choices[0].finish_reason)
        except openai.APIError as error:
            ends.append(error.body['code'])
    assert sorted(ends) == ['length', 'node_failed']
    assert [answer.result(60).usage.completion_tokens for answer in waiting] == [1000, 1000]
    for _ in range(4):
        answer = api.chat.completions.create(model='toy', messages=MESSAGES, max_tokens=3)
        assert answer.choices[0].message.role == 'assistant'
    end = time.monotonic() + 10
    while status(url)[killed]['up']:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert status(url)[other]['up'] and status(url)[killed]['reason']


def test_a_server_that_ends_leaves_and_the_proxy_ends_well(fleet):
    """The last test of this fleet."""
    url, proxy, nodes = fleet
    server = nodes[list(nodes)[1]]
    server.popen.send_signal(signal.SIGTERM)
    assert server.popen.wait(30) == 0
    assert list(status(url)) == list(nodes)[:1]  # the killed one could not say good-bye
    with pytest.raises(openai.InternalServerError) as caught:
        client(url).chat.completions.create(model='toy', messages=MESSAGES)
    assert caught.value.status_code == 503 and caught.value.response.headers['retry-after']
    counts = requests.get(f'{url}/metrics', headers={'Authorization': 'Bearer client-key'}, timeout=10).text
    assert 'lmdeploy:proxy_requests_in_flight 0.0' in counts
    assert f'lmdeploy:proxy_node_up{{node="{list(nodes)[0]}"}} 0.0' in counts
    proxy.popen.send_signal(signal.SIGTERM)
    assert proxy.popen.wait(30) == 0
    said = proxy.log.read_text()
    assert 'Traceback' not in said and KEY not in said and 'client-key' not in said


def test_a_new_node_key_is_printed_and_a_wrong_one_is_told(tmp_path):
    with lmdeploy(tmp_path, 'proxy', 'proxy', '--disable-cache-status', key='') as proxy:
        url = proxy.wait_for(r'ready at (http://127.0.0.1:\d+)')
        key = proxy.wait_for(r'Node key: (\S+)')
        headers = {'Authorization': f'Bearer {key}'}
        assert requests.get(f'{url}/nodes/status', headers=headers, timeout=10).json() == {}
        assert requests.get(f'{url}/nodes/status', headers={'Authorization': f'Bearer {key}x'},
                            timeout=10).status_code == 401
        with socket.create_server(('127.0.0.1', 0)) as taken:
            port = str(taken.getsockname()[1])
            busy = subprocess.run([sys.executable, '-m', 'lmdeploy', 'serve', 'proxy', '--server-port', port],
                                  capture_output=True, text=True, cwd=ROOT, timeout=60)
            assert busy.returncode == 98 and 'LMD-501' in busy.stderr
