"""The tutorial's programs for a server as a reader types them (paths and ports aside), each in its own process."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmdeploy.serve.openai.api_client import APIClient, ServerConnectionError
from tests.toy import write_model

ROOT = Path(__file__).resolve().parents[2]
PATH = '/root/share/new_models/internlm3/internlm3-8b-instruct'

SYNC = """
from openai import OpenAI
client = OpenAI(
    api_key='none',# 若未启用鉴权,可填任意值(如 "none")
    base_url="http://0.0.0.0:23333/v1"
)
model_name = client.models.list().data[0].id
response = client.chat.completions.create(
    model=model_name,
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": " provide three suggestions about time management"},
    ],
    temperature=0.8,
    top_p=0.8
)
print(response)
"""
STREAM = SYNC.replace('    top_p=0.8\n', '    top_p=0.8,\n    stream=True\n').replace('print(response)', """
for chunk in response:
    print(chunk.choices[0].delta.content or '', end='')
""")
ASYNC = """
import asyncio
from openai import AsyncOpenAI
async def main():
    client = AsyncOpenAI(api_key='token',
                         base_url='http://0.0.0.0:23333/v1')
    model_cards = await client.models.list()._get_page()
    response = await client.chat.completions.create(
        model=model_cards.data[0].id,
        messages=[
            {
                'role': 'system',
                'content': 'You are a helpful assistant.'
            },
            {
                'role': 'user',
                'content': ' provide three suggestions about time management'
            },
        ],
        temperature=0.8,
        top_p=0.8)
    print(response)
asyncio.run(main())
"""
API_CLIENT = """
from lmdeploy.serve.openai.api_client import APIClient
client = APIClient(
    api_server_url="http://localhost:23333",
    api_key="token"
)
model_name = client.available_models[0]
messages = [{"role": "user", "content": "你好"}]
for item in client.chat_completions_v1(model=model_name, messages=messages):
    print(item)
"""
REQUESTS = """
import requests
url = "http://localhost:23333/v1/chat/completions"
headers = {
    "Authorization": "Bearer token",  # Bearer + Token
    "Content-Type": "application/json"
}
data = {
    "model": "/root/share/new_models/internlm3/internlm3-8b-instruct",
    "messages": [{"role": "user", "content": "你好"}]
}
response = requests.post(url, headers=headers, json=data)
print(response.json()["choices"][0]["message"]["content"])
"""


@dataclass(frozen=True, slots=True)
class Tutorial:
    """A running server and the programs that are typed against it."""

    model: str
    port: int
    folder: Path

    def program(self, text: str) -> str:
        """What a program prints that ends well."""
        text = text.replace('23333', str(self.port)).replace(PATH, self.model)
        out = subprocess.run([sys.executable, '-X', 'utf8', '-c', text], capture_output=True, timeout=300,
                             cwd=self.folder, env={**os.environ, 'PYTHONPATH': str(ROOT)}, encoding='utf-8')
        assert out.returncode == 0, out.stderr
        return out.stdout

    def lmdeploy(self, *argv: str, lines: str = '') -> str:
        """What a command prints, given lines on its standard input."""
        out = subprocess.run([sys.executable, '-X', 'utf8', '-m', 'lmdeploy', *argv], input=lines, encoding='utf-8',
                             capture_output=True, timeout=300, cwd=self.folder,
                             env={**os.environ, 'PYTHONPATH': str(ROOT), 'LMDEPLOY_LANG': 'en'})
        assert out.returncode == 0, out.stderr
        return out.stdout


@contextmanager
def api_server(model: str, folder: Path, *argv: str, key: str | None = None) -> Iterator[Tutorial]:
    """``lmdeploy serve api_server MODEL --server-port PORT ...``, from its start until it has ended well."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    log = (folder / f'server-{port}.log').open('w+')
    process = subprocess.Popen(
        [sys.executable, '-m', 'lmdeploy', 'serve', 'api_server', model, '--server-port', str(port), *argv],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'LMDEPLOY_LANG': 'en'})

    def printed() -> str:
        log.seek(0)
        return log.read()

    try:
        client, end = APIClient(f'http://127.0.0.1:{port}', key), time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < end, printed()
            try:
                if client.health()[0]:
                    break
            except ServerConnectionError:
                pass
            time.sleep(0.1)
        yield Tutorial(model, port, folder)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, printed()
        assert 'Traceback' not in printed(), printed()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()


@pytest.fixture(scope='session')
def toy(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp('tutorial') / 'toy', max_position_embeddings=256)


@pytest.fixture(scope='session')
def open_server(toy, tmp_path_factory):
    with api_server(str(toy), tmp_path_factory.mktemp('open')) as running:
        yield running


@pytest.fixture(scope='session')
def keyed_server(toy, tmp_path_factory):
    with api_server(str(toy), tmp_path_factory.mktemp('keyed'), '--api-keys', 'token', key='token') as running:
        yield running


def is_completion(text: str, model: str) -> bool:
    """Whether a program printed one completion of the openai package, with an answer in it."""
    return text.startswith('ChatCompletion(id=') and f'model={model!r}' in text and "role='assistant'" in text


def test_openai(open_server):
    assert is_completion(open_server.program(SYNC), open_server.model)


def test_openai_streams(open_server):
    assert open_server.program(STREAM)


def test_openai_with_a_key(keyed_server):
    assert is_completion(keyed_server.program(SYNC.replace("'none'", "'token'")), keyed_server.model)
    assert 'AuthenticationError 401' in keyed_server.program(
        f'try:\n{indent(SYNC)}\nexcept Exception as error:\n    print(type(error).__name__, error.status_code)')


def indent(text: str) -> str:
    return '\n'.join(f'    {line}' for line in text.splitlines())


def test_openai_async(keyed_server):
    assert is_completion(keyed_server.program(ASYNC), keyed_server.model)


def test_api_client(keyed_server):
    item = ast.literal_eval(keyed_server.program(API_CLIENT))
    assert item['object'] == 'chat.completion' and item['model'] == keyed_server.model
    assert item['choices'][0]['message']['role'] == 'assistant' and item['usage']['completion_tokens'] > 0


def test_api_client_without_a_key(open_server):
    item = ast.literal_eval(open_server.program(API_CLIENT.replace(',\n    api_key="token"', '')))
    assert item['object'] == 'chat.completion'


def test_requests(keyed_server):
    assert keyed_server.program(REQUESTS).strip()


def test_the_terminal(keyed_server):
    url = f'http://0.0.0.0:{keyed_server.port}'
    out = keyed_server.lmdeploy('serve', 'api_client', url, '--api-key', 'token', '--max-new-tokens', '4',
                                lines='你好\nend\n你好\nexit\nnever asked\n')
    assert out.strip()


@pytest.mark.real
def test_a_real_model_answers(smollm2, tmp_path):
    model = str(smollm2)
    with api_server(model, tmp_path, '--api-keys', 'token', '--session-len', '112', key='token') as server:
        assert is_completion(server.program(SYNC.replace("'none'", "'token'")), model)
        assert is_completion(server.program(ASYNC), model)
        assert len(server.program(STREAM.replace("'none'", "'token'")).split()) > 10
        assert ast.literal_eval(server.program(API_CLIENT))['choices'][0]['message']['content']
        assert server.program(REQUESTS).strip()
        said = server.lmdeploy('serve', 'api_client', f'http://localhost:{server.port}', '--api-key', 'token',
                               '--temperature', '0', '--max-new-tokens', '16',
                               lines='My name is Ada.\nWhat is my name?\n')
        assert 'Ada' in said
