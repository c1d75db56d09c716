"""``lmdeploy chat`` on a model: one question, pipes, interrupts, failures; and the other commands."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy.cli.entrypoint import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lmdeploy(tmp_path):
    """Run a command line in an empty folder with an empty model cache."""
    def run(*argv: str, stdin: bytes | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
        options = {'input': stdin} if stdin is not None else {'stdin': subprocess.DEVNULL}
        return subprocess.run([sys.executable, '-m', 'lmdeploy', *argv], capture_output=True, timeout=120, cwd=tmp_path,
                              env=environment(tmp_path, **env), **options)

    return run


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'LMDEPLOY_CACHE': str(folder / 'cache'), 'LMDEPLOY_LANG': 'en',
            'HF_HUB_OFFLINE': '1', **more}


def test_one_question(lmdeploy, toy):
    argv = ('chat', str(toy), '-q', 'the quick brown fox', '--max-new-tokens', '8', '--seed', '3')
    first, again = lmdeploy(*argv, '--verbose'), lmdeploy(*argv)
    assert first.returncode == again.returncode == 0, first.stderr.decode()
    assert first.stdout == again.stdout  # a seed makes answers repeatable
    err = first.stderr.decode()
    assert 'engine: eager runner on ' in err and 'tokens/s]' in err
    assert 'Traceback' not in err


def test_a_pipe_is_a_conversation(lmdeploy, toy):
    lines = '/set max_new_tokens=4 verbose=on\nhello\n"""two\nlines"""\n/set top_p=7\nend\nhello\n'
    out = lmdeploy('chat', str(toy), '--session-len', '512', stdin=lines.encode())
    err = out.stderr.decode()
    assert out.returncode == 1  # the wrong setting failed
    assert err.count('tokens/s]') == 3 and err.count('error LMD-310') == 1
    prompts = [line.split(' prompt')[0] for line in err.splitlines() if 'prompt tokens' in line]
    assert prompts[0] == prompts[2] != prompts[1]  # 'end' forgot what was said


def test_a_question_from_standard_input(lmdeploy, toy):
    out = lmdeploy('chat', str(toy), '-q', '-', '--max-new-tokens', '2', stdin='你好\n世界'.encode())
    assert out.returncode == 0, out.stderr.decode()


@pytest.mark.parametrize('argv, stdin, code, words', [
    (['chat', 'TOY'], b'', 2, 'error LMD-404'),
    (['chat', 'TOY', '-q', ' '], None, 2, 'error LMD-404'),
    (['chat', 'TOY', '-q', '-'], b'\xff\xfe', 2, 'error LMD-405'),
    (['chat', 'TOY'], b'fine\n\xff\n', 2, 'error LMD-405'),
    (['chat', 'TOY', '-q', 'x', '--eager-mode', '--communicator', 'nccl'], None, 2, 'error LMD-406'),
    (['chat', '/no/such/model', '-q', 'x'], None, 66, 'error LMD-102'),
    (['chat', 'no-such-name', '-q', 'x'], None, 66, 'error LMD-104'),
    (['pull', 'no-such-name'], None, 66, 'error LMD-104'),
    (['chat', 'TOY', '-q', 'x', '--tp', '0'], None, 78, 'error LMD-222'),
    (['chat', 'TOY', '-q', 'x', '--adapters', 'a=/b'], None, 78, 'error LMD-227'),
    (['chat', 'TOY', '-q', 'x', '--chat-template', 'nothing'], None, 65, 'error LMD-170'),
    (['chat', 'TOY', '-q', 'x', '--temperature', '9'], None, 1, 'error LMD-310'),
    (['chat', '/no/such/model', '-q', 'x', '--temperature', '9'], None, 1, 'error LMD-310'),  # before the model
    (['chat', 'TOY', '-q', 'x ' * 100, '--session-len', '64'], None, 1, 'error LMD-301'),
    (['rm', 'smollm2:135m'], None, 1, 'nothing to remove'),
    (['check_env', '--dump-file', '/no/such/folder/env.json'], None, 2, 'error LMD-408'),
])
def test_failures_are_one_screen(toy, tmp_path, monkeypatch, capsys, argv, stdin, code, words):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin or b'')))
    assert main([str(toy) if word == 'TOY' else word for word in argv]) == code
    err = capsys.readouterr().err
    assert words in err and 'Traceback' not in err
    assert len(err.splitlines()) <= 12


def test_errors_are_told_in_chinese(monkeypatch, capsys):
    monkeypatch.setenv('LMDEPLOY_LANG', 'zh')
    assert main(['chat', '/no/such/model', '-q', 'x']) == 66
    err = capsys.readouterr().err
    assert '错误 LMD-102' in err and '不存在' in err


def test_an_interrupt_is_quiet(toy, tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-m', 'lmdeploy', 'chat', str(toy), '-q', 'hello', '--max-new-tokens', '30000'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=tmp_path,
        env=environment(tmp_path), start_new_session=True)
    try:
        pipe = process.stdout
        assert pipe is not None and pipe.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.decode().strip() == '[stopped]'


def test_list_and_templates(capsys):
    assert main(['list']) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith('smollm2:135m') and 'Apache-2.0' in row and 'demo size' in row for row in rows)
    assert main(['list', '--templates']) == 0
    assert {'internlm2', 'qwen2d5', 'llama3', 'base'} <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize('name', ['env.json', 'env.yml'])
def test_check_env(tmp_path, capsys, name):
    assert main(['check_env', '--dump-file', str(tmp_path / name)]) == 0
    facts = dict(line.split(': ', 1) for line in capsys.readouterr().out.splitlines())
    assert {'lmdeploy', 'python', 'torch', 'platform', 'memory', 'torch threads'} <= set(facts)
    text = (tmp_path / name).read_text()
    if name.endswith('.json'):
        assert json.loads(text) == facts
    else:
        pairs = (line.split(': ', 1) for line in text.splitlines())
        assert {json.loads(key): json.loads(value) for key, value in pairs} == facts
