"""lmdeploy.serve() and lmdeploy.client(): a server as a child, from its start to its end, and its errors as ours."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lmdeploy
from lmdeploy import ChatTemplateConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.cli.api_server import add_arguments
from lmdeploy.cli.args import engine_config, template_config
from lmdeploy.cli.command import engine_flags, template_flags
from lmdeploy.errors import ConfigError, EngineDead, LoadError, SourceError
from lmdeploy.serve.launch import revive, tell
from lmdeploy.serve.openai.api_client import APIClient
from tests.toy import write_model

ROOT = Path(__file__).resolve().parents[2]
CPU = PytorchEngineConfig(device_type='cpu', session_len=256)
SCRIPT = """
import os, signal, sys, lmdeploy
client = lmdeploy.serve('toy', server_port=0, backend_config=lmdeploy.PytorchEngineConfig(device_type='cpu'))
[answer] = client.chat_completions_v1(client.available_models[0], 'hello', max_tokens=3)
print(client.process.pid, answer['model'], answer['usage']['completion_tokens'], flush=True)
if sys.argv[1] == 'killed':
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('launch') / 'toy')


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process, not a child of ours, ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        except OSError:
            return True
        if state == 'Z':
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize('end', ['at its end', 'killed'])
def test_a_script_without_a_guard(toy, end):
    """The model's name is the path as typed, stdout is the script's alone, and no process stays."""
    out = subprocess.run([sys.executable, '-c', SCRIPT, end], capture_output=True, text=True, timeout=120,
                         cwd=toy.parent, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert out.returncode == (0 if end == 'at its end' else -signal.SIGKILL), out.stderr
    pid, model, tokens = out.stdout.split()
    assert (model, tokens) == ('toy', '3')
    assert gone(int(pid))


def test_keys_and_the_end(toy):
    with lmdeploy.serve(str(toy), 'a name', server_port=0, backend_config=CPU, api_keys='one,two',
                        chat_template_config=ChatTemplateConfig('base')) as client:
        pid = client.process.pid
        assert isinstance(client, APIClient) and client.available_models == ['a name']
        assert 'one' not in Path(f'/proc/{pid}/cmdline').read_text()
        other = lmdeploy.client(client.api_server_url, 'two')
        assert other.available_models == ['a name']
        assert lmdeploy.client(client.api_server_url).available_models is None
        [answer] = client.chat_completions_v1('a name', [{'role': 'user', 'content': 'x'}], max_tokens=1)
        assert answer['usage']['prompt_tokens'] == 1  # the base template adds nothing
    assert client.process.status == 0
    client.close()
    with pytest.raises(ConnectionError):
        client.encode('x')


def test_tls(toy, tmp_path, monkeypatch):
    """The client of a server that we start trusts its certificate, though nobody signed it; others do not."""
    key, certificate = tmp_path / 'key.pem', tmp_path / 'certificate.pem'
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=somewhere',
                    '-keyout', key, '-out', certificate], check=True, capture_output=True)
    monkeypatch.delenv('SSL_KEYFILE', raising=False)
    with pytest.raises(ConfigError, match='LMD-503'):
        lmdeploy.serve(str(toy), server_port=0, ssl=True)
    monkeypatch.setenv('SSL_KEYFILE', str(key))
    monkeypatch.setenv('SSL_CERTFILE', str(certificate))
    with lmdeploy.serve(str(toy), server_port=0, ssl=True, backend_config=CPU) as client:
        assert client.api_server_url.startswith('https://')
        [*chunks] = client.chat_completions_v1(str(toy), 'x', max_tokens=3, stream=True)
        assert chunks[-1]['choices'][0]['finish_reason']
        with pytest.raises(ConnectionError, match='LMD-580.*certificate'):
            lmdeploy.client(client.api_server_url).encode('x')
        with pytest.raises(ConnectionError, match='LMD-582'):
            lmdeploy.client(client.api_server_url.replace('https', 'http')).encode('x')


def test_errors_of_the_server_are_ours(toy, tmp_path):
    with pytest.raises(SourceError) as missing:
        lmdeploy.serve(str(tmp_path / 'nothing'), server_port=0)
    assert missing.value.code == 'LMD-102' and '不存在' in missing.value.text('zh')
    with pytest.raises(ConfigError, match='LMD-222.*session_len'):
        lmdeploy.serve(str(toy), server_port=0, backend_config=TurbomindEngineConfig(session_len=-4))
    broken = tmp_path / 'broken'
    broken.mkdir()
    for file in toy.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:None if file.suffix == '.json' else 1000])
    with pytest.raises(LoadError):
        lmdeploy.serve(str(broken), server_port=0, backend_config=CPU)
    with pytest.raises(EngineDead, match='LMD-584.*status 2'):
        lmdeploy.serve(str(toy), server_port=0, backend='none')  # type: ignore[arg-type]


def test_what_is_found_before_the_server_starts(toy):
    with socket.create_server(('127.0.0.1', 0)) as taken, pytest.raises(ConfigError, match='LMD-501'):
        lmdeploy.serve(str(toy), server_port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match='LMD-586'):
        lmdeploy.serve(str(toy), server_port=0, api_keys=['a,b'])
    with pytest.raises(ConfigError, match='LMD-585.*thread_safe'):
        lmdeploy.serve(str(toy), server_port=0, backend_config=PytorchEngineConfig(thread_safe=True))


@pytest.mark.parametrize('order', ['import lmdeploy', 'import lmdeploy\nlmdeploy.serve',
                                   'from lmdeploy.serve.openai.api_client import APIClient\nimport lmdeploy',
                                   'from lmdeploy import serve\nimport lmdeploy\nassert lmdeploy.serve is serve'])
def test_serve_is_a_function_and_a_package(order):
    code = f"""{order}
import lmdeploy.serve.openai
assert callable(lmdeploy.serve) and callable(lmdeploy.client) and lmdeploy.serve.openai
try:
    lmdeploy.serve('x', server_port=0, api_keys=['a,b'])
except ValueError as error:
    assert error.code == 'LMD-586'"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60, cwd=ROOT)


def read(flags: list[str]):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(['model', *flags])


@pytest.mark.parametrize('config', [
    TurbomindEngineConfig(), PytorchEngineConfig(),
    TurbomindEngineConfig(cache_max_entry_count=0.25, session_len=100, max_batch_size=2, cache_block_seq_len=32,
                          enable_prefix_caching=True, quant_policy=8, rope_scaling_factor=2.0, communicator='native'),
    TurbomindEngineConfig(cache_max_entry_count=200),
    PytorchEngineConfig(device_type='cpu', block_size=16, eager_mode=True, adapters={'a': '/x', 'b': '/y'},
                        dtype='float32'),
], ids=range(5))
def test_the_flags_of_a_config_spell_that_config(config):
    from lmdeploy.cli.api_server import ALL_ENGINE_OPTIONS

    assert engine_config(read(engine_flags(config)), ALL_ENGINE_OPTIONS) == config


def test_metrics_have_a_flag():
    flags = engine_flags(TurbomindEngineConfig(enable_metrics=False))
    assert read(flags).disable_metrics is True


@pytest.mark.parametrize('config', [None, ChatTemplateConfig('qwen'), ChatTemplateConfig('hf'),
                                    ChatTemplateConfig('base', system='<系统>\n', stop_words=['a', '"b"'])])
def test_the_flags_of_a_template_spell_that_template(config):
    assert template_config(read(template_flags(config))) == config


def test_errors_survive_the_way():
    from lmdeploy.texts.source import phrase

    missing = SourceError('LMD-102', path=Path('/x'), hint=phrase('windows path'))
    for error in (missing, EngineDead('LMD-584', status=1)):
        again = revive(tell(error))
        assert type(again) is type(error) and str(again) == str(error) and again.text('zh') == error.text('zh')
    for told in (b'', b'[]', b'{}', b'["SourceError", "LMD-999", {}]', b'["annotations", "LMD-584", {}]',
                 b'["SourceError", "LMD-102", {}]', json.dumps(['ConfigError', 'LMD-102', 3]).encode()):
        assert revive(told) is None


def test_generation_config_is_no_engine_config(toy):
    with pytest.raises(ConfigError, match='LMD-585'):
        lmdeploy.serve(str(toy), server_port=0, backend_config=GenerationConfig(n=3))  # type: ignore[arg-type]
