"""lmdeploy serve api_server as a program: options, their origins, a whole life with a tiny model, crashes, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields

import pytest
import requests

from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.cli.api_server import ALL_ENGINE_OPTIONS, OPTIONS
from lmdeploy.cli.entrypoint import main
from lmdeploy.cli.screen import Screen
from lmdeploy.errors import ConfigError
from lmdeploy.log import get_logger

CHAT = {'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 5}
TUTORIAL_FLAGS = """--server-name --server-port --allow-origins --allow-methods --allow-headers --allow-credentials
 --proxy-url --max-concurrent-requests --backend --log-level --api-keys --ssl --model-name --max-log-len
 --disable-fastapi-docs --allow-terminate-by-client --chat-template --tool-call-parser --reasoning-parser --revision
 --download-dir --adapters --device --eager-mode --dtype --tp --dp --ep --session-len --max-batch-size
 --cache-max-entry-count --cache-block-seq-len --enable-prefix-caching --max-prefill-token-num --quant-policy
 --model-format --enable-microbatch --enable-eplb --role --migration-backend --node-rank --nnodes --rope-scaling-factor
 --num-tokens-per-iter --max-prefill-iters --communicator --vision-max-batch-size""".split()


def test_every_flag_of_lmdeploy_is_known():
    known = {option.flag for option in (*OPTIONS, *ALL_ENGINE_OPTIONS)} | {'--backend', '--chat-template'}
    assert set(TUTORIAL_FLAGS) <= known
    for option in ALL_ENGINE_OPTIONS:
        assert option.turbomind is None or option.turbomind in {f.name for f in fields(TurbomindEngineConfig)}
        assert option.pytorch is None or option.pytorch in {f.name for f in fields(PytorchEngineConfig)}


def config(capsys, *argv: str) -> dict[str, tuple[str, str]]:
    assert main(['serve', 'api_server', *argv, '--print-config']) == 0
    found = {}
    for line in capsys.readouterr().out.splitlines():
        name, value, origin = re.fullmatch(r'(\S+) +(.*?) {1,}(default|command line|/\S+|LMDEPLOY_\S+)', line).groups()
        found[name] = (value.strip(), origin)
    return found


def test_every_option_has_a_value_and_an_origin(tmp_path, capsys):
    path = tmp_path / 'server.yaml'
    path.write_text('server-port: 1234\napi_keys: [secret1]\n--max-batch-size: 3\nmodel_path: m1\ndevice: cpu\n')
    found = config(capsys, 'm2', '--server-port', '99', '--config', str(path), '--lang', 'en')
    assert found['server_port'] == ('99', 'command line') and found['model_path'] == ("'m2'", 'command line')
    assert found['max_batch_size'] == ('3', str(path)) and found['device'] == ("'cpu'", str(path))
    assert found['api_keys'] == ("'***'", str(path)) and found['ssl'] == ('False', 'default')
    assert config(capsys, '--config', str(path))['model_path'] == ("'m1'", str(path))


def test_variables_are_origins_and_engine_options_show_their_defaults(monkeypatch, capsys):
    monkeypatch.setenv('LMDEPLOY_API_KEYS', 'secret1,secret2')
    monkeypatch.setenv('LMDEPLOY_LOG_LEVEL', 'info')
    found = config(capsys, 'm', '--lang', 'en')
    assert found['api_keys'] == ("'***'", 'LMDEPLOY_API_KEYS')
    assert found['log_level'] == ("'INFO'", 'LMDEPLOY_LOG_LEVEL')
    assert found['cache_max_entry_count'] == ('0.8', 'default') and found['role'] == ("'Hybrid'", 'default')


@pytest.mark.parametrize(('text', 'code'), [
    ('nothing: 1', 'LMD-411'), ('server_port: x', 'LMD-411'), ('ssl: 1', 'LMD-411'), ('api_keys: k', 'LMD-411'),
    ('[1]', 'LMD-410'), (': :', 'LMD-410'), ('!!python/object/apply:os.system [ls]', 'LMD-410')])
def test_bad_config_files(tmp_path, capsys, text, code):
    path = tmp_path / 'server.yaml'
    path.write_text(text)
    assert main(['serve', 'api_server', 'm', '--config', str(path), '--lang', 'en']) == 2
    assert code in capsys.readouterr().err


@pytest.mark.parametrize(('argv', 'code', 'text'), [
    ([], 2, 'LMD-412'),
    (['m', '--limit', 'x=1'], 78, 'LMD-527'),
    (['m', '--request-timeout', '0'], 78, 'LMD-527'),
    (['m', '--tool-call-parser', 'x'], 78, 'LMD-221'),
    (['m', '--reasoning-parser', 'x'], 78, 'LMD-221'),
    (['m', '--allow-origins', '*', '--allow-credentials'], 78, 'LMD-527'),
    (['m', '--api-keys-file', '/none'], 78, 'LMD-528'),
    (['m', '--ssl'], 78, 'LMD-503'),
    (['m', '--log-level', 'loud'], 78, 'LMD-221'),
    (['m', '--log-format', 'xml'], 78, 'LMD-527'),
    (['m', '--drain-timeout', '-1'], 78, 'LMD-527'),
    (['m', '--proxy-url', 'http://x'], 78, 'LMD-527'),
    (['m', '--proxy-url', 'ftp://x', '--node-key', 'k'], 78, 'LMD-581'),
    (['m', '--server-port', '70000'], 98, 'LMD-502'),
    (['m', '--server-port', '0', '--dp', '2'], 78, 'LMD-227'),
    (['m', '--server-port', '0', '--server-name', '0.0.0.0', '--enable-admin'], 78, 'LMD-527'),
    (['/no/such/model', '--server-port', '0'], 66, 'LMD-102'),
])
def test_wrong_options_end_on_one_screen(capsys, monkeypatch, argv, code, text):
    monkeypatch.delenv('SSL_KEYFILE', raising=False)
    assert main(['serve', 'api_server', *argv, '--lang', 'en']) == code
    assert text in capsys.readouterr().err


def test_logs_for_machines_have_no_other_lines(capsys, tmp_path):
    logger = get_logger()
    before = [(handler, handler.formatter) for handler in logger.handlers]
    config = tmp_path / 'server.yaml'
    config.write_text('log_format: json')
    try:
        for argv in (['--log-format', 'json'], ['--config', str(config)]):
            main(['serve', 'api_server', '/none', '--server-port', '0', '--max-log-len', '3', '--lang', 'en', *argv])
            told = capsys.readouterr().err.splitlines()
            messages = [json.loads(line)['message'] for line in told]
            assert '--max-log-len' in messages[0] and 'LMD-102' in messages[-1]
    finally:
        for handler, formatter in before:
            handler.setFormatter(formatter)
    screen = Screen('en', as_json=True)
    screen.note('serve_ready', models='m', url='u', page='-', docs='-', session_len=1, kv_tokens=1, kv_gib=1.0,
                cache='int8', batch=1, keys=0)
    screen.error(ConfigError('LMD-412'))
    screen.line('stats')
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [entry['level'] for entry in told] == ['INFO', 'ERROR', 'INFO'] and 'LMD-412' in told[1]['message']
    assert told[0].keys() == {'time', 'level', 'where', 'message'} and told[2]['message'] == 'stats'


def test_limits_are_printed(capsys):
    assert main(['serve', 'api_server', '--print-limits', '--limit', 'n=7', '--request-timeout', '9']) == 0
    out = capsys.readouterr().out
    assert re.search(r'^n +7 ', out, re.M) and re.search(r'^request_seconds +9 ', out, re.M)


class Process:
    """A running server and what it says."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ''

    def until(self, pattern: str, seconds: float = 60) -> re.Match:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            line = self.process.stderr.readline()
            assert line, self.lines
            self.lines.append(line)
            found = re.search(pattern, line)
            if found:
                return found
        raise AssertionError(self.lines)


@contextmanager
def started(*argv: str, **variables: str):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'LMDEPLOY_LANG': 'en', **variables}
    process = subprocess.Popen([sys.executable, '-m', 'lmdeploy', 'serve', 'api_server', *argv, '--server-port', '0'],
                               stderr=subprocess.PIPE, text=True, env=env)
    server = Process(process)
    try:
        server.url = server.until(r'(http://[\d.]+:\d+)/health').group(1)
        server.until('^curl ')
        yield server
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()


def children(pid: int) -> list[int]:
    found = []
    for entry in os.listdir('/proc'):
        if entry.isdigit():
            try:
                with open(f'/proc/{entry}/stat') as file:
                    if int(file.read().rsplit(')', 1)[1].split()[1]) == pid:
                        found.append(int(entry))
            except OSError:
                continue
    return found


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='looks at processes through /proc')
def test_a_whole_life(toy, tmp_path):
    audit = tmp_path / 'audit.jsonl'
    with started(str(toy), '--session-len', '512', '--max-batch-size', '4', '--audit-log', str(audit),
                 LMDEPLOY_API_KEYS='one,two') as server:
        url, key = server.url, {'authorization': 'Bearer two'}
        model = requests.get(f'{url}/v1/models', headers=key, timeout=10).json()['data'][0]['id']
        assert model == str(toy)
        body = CHAT | {'model': model, 'logprobs': True, 'top_logprobs': 3, 'temperature': 0}
        answer = requests.post(f'{url}/v1/chat/completions', headers=key, json=body, timeout=30).json()
        [choice] = answer['choices']
        tokens = choice['logprobs']['content']
        assert len(tokens) == answer['usage']['completion_tokens'] == 5
        assert bytes(sum((t['bytes'] for t in tokens), [])).decode(errors='replace') == choice['message']['content']
        for token in tokens:
            values = [top['logprob'] for top in token['top_logprobs']]
            assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] == token['logprob'] <= 0
        with open(f'/proc/{server.process.pid}/maps') as maps:
            assert 'libtorch' not in maps.read()  # the model lives in the child
        [engine] = children(server.process.pid)
        text = requests.post(f'{url}/v1/completions', headers=key, timeout=30, json={
            'model': model, 'prompt': 'a', 'max_tokens': 3, 'logprobs': 2, 'temperature': 0}).json()['choices'][0]
        lists = ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset')
        assert [len(text['logprobs'][name]) for name in lists] == [3] * 4
        long = CHAT | {'model': model, 'stream': True, 'max_tokens': 400, 'ignore_eos': True}
        with requests.post(f'{url}/v1/chat/completions', headers=key, stream=True, timeout=30, json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(engine, signal.SIGKILL)
            start = time.monotonic()
            rest = [line for line in lines if line]
            assert time.monotonic() - start < 2
            assert json.loads(rest[-1][6:])['error']['code'] == 'engine_unavailable'
        told = requests.get(f'{url}/health', timeout=5)
        assert told.status_code == 503 and told.json()['status'] == 'unhealthy'
        end = time.monotonic() + 60
        while requests.get(f'{url}/ready', timeout=5).status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.2)
        again = requests.post(f'{url}/v1/chat/completions', headers=key, json=body, timeout=30).json()
        assert again['choices'] == answer['choices']
        [engine] = children(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        assert not os.path.exists(f'/proc/{engine}')
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [e['outcome'] for e in entries if e['route'].startswith('/v1/c')] == [
        'finished', 'finished', 'engine_unavailable', 'finished']
    assert 'two' not in audit.read_text()


def test_ctrl_c_while_the_model_loads_ends_at_once(toy):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'LMDEPLOY_LANG': 'en'}
    command = [sys.executable, '-m', 'lmdeploy', 'serve', 'api_server', str(toy), '--server-port', '0']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) in (0, 130)
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()
