"""``lmdeploy serve api_client``: the terminal's conversation with a server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy.cli.remote import FIELDS, RemoteConversation
from lmdeploy.cli.settings import FIELDS as SETTINGS
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.openai.api_client import APIClient, ServerConnectionError
from tests.serve.live import live

ROOT = Path(__file__).resolve().parents[2]
GREEDY = GenerationConfig(do_sample=True, temperature=0.0, max_new_tokens=6)


def talk(url: str, *argv: str, lines: str = '') -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-m', 'lmdeploy', 'serve', 'api_client', url, *argv], input=lines, text=True,
                          capture_output=True, timeout=60, encoding='utf-8',
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'LMDEPLOY_LANG': 'en'})


def test_a_pipe_is_a_conversation(serve):
    lines = '/set max_new_tokens=4 verbose=on\nhello\n你好\n/set bad_words=["x"]\nend\nhello\n'
    server = serve(keys=KeyRing(['token']))
    with live(server) as running:
        out = talk(running.url, '--api-key', 'token', '--temperature', '0', lines=lines)
        refused = talk(running.url, '-q', 'hello')
    assert out.returncode == 1 and out.stderr.count('error LMD-402') == 1, out.stderr  # no such setting there
    lengths = [int(line.split()[0][1:]) for line in out.stderr.splitlines() if 'prompt tokens' in line]
    assert lengths[0] == lengths[2] < lengths[1]  # the server remembers, until 'end'
    answers = out.stdout.splitlines()
    assert answers[0] == answers[-1] and out.stderr.count(' 4 tokens at') == 3
    assert refused.returncode == 1 and 'error LMD-504' in refused.stderr and 'api key' in refused.stderr
    assert server.settled()


def test_one_question_and_nobody_there(serve):
    with live(serve()) as running:
        out = talk(f'0.0.0.0:{running.port}', '-q', 'hello', '--max-new-tokens', '3', '--seed', '1')
        assert out.returncode == 0 and out.stdout.strip() and 'cut off after 3 tokens' in out.stderr
        assert talk(running.url, '--session-id', '-1', '-q', 'x').returncode == 2
    gone = talk(running.url, '-q', 'hello')
    assert gone.returncode == 1 and 'error LMD-580' in gone.stderr and not gone.stdout


@pytest.fixture
def conversation(serve):
    with live(serve(step_seconds=0.002)) as running:
        yield RemoteConversation(APIClient(running.url), 3, GREEDY)


def prompt(talk: RemoteConversation) -> list[dict]:
    """The conversation that the server continues, as ``ask`` makes it: history plus question."""
    return [*([{'role': 'system', 'content': talk.system}] if talk.system else []), *talk.turns]


def alone(talk: RemoteConversation, messages: list[dict]) -> tuple[str, int]:
    """The answer to the whole conversation at once, and the length of its prompt."""
    [answer] = talk.client.chat_interactive_v1(messages, request_output_len=6, temperature=0.0)
    return answer['text'], answer['input_tokens']


def test_each_turn_is_that_of_the_whole_conversation(conversation):
    """Whatever happens between turns: the server answers as if it had been sent everything that was said."""
    def turn(question: str) -> None:
        expected = alone(conversation, [*prompt(conversation), {'role': 'user', 'content': question}])
        pieces = list(conversation.ask(question))
        assert (''.join(piece.text for piece in pieces), pieces[-1].input_len) == expected, question

    turn('one')
    turn('two')
    conversation.system = 'Be brief.'
    turn('three')
    conversation.gen = GenerationConfig(do_sample=True, temperature=0.0, max_new_tokens=200, ignore_eos=True)
    stopped = conversation.ask('four')
    for _ in range(3):
        next(stopped)
    stopped.close()
    assert conversation.turns[-1]['role'] == 'assistant' and len(conversation.turns) == 8
    conversation.gen = GREEDY
    turn('five')
    conversation.gen = GenerationConfig(do_sample=True, top_p=7.0)
    [failed] = conversation.ask('six')
    assert failed.error.code == 'LMD-512' and failed.finish_reason == 'error'
    conversation.gen = GREEDY
    turn('seven')
    conversation.reset()
    turn('eight')
    conversation.close()
    turn('nine')


def test_what_is_too_long_says_so(conversation):
    [failed] = conversation.ask('x' * 2000)
    assert failed.error.code in ('LMD-301', 'LMD-307')
    assert conversation.turns == []


def test_settings_are_fields_of_both():
    from lmdeploy.serve.openai.protocol import InteractiveRequest

    assert set(FIELDS) < set(SETTINGS)
    assert set(FIELDS.values()) <= set(InteractiveRequest.model_fields)


def test_a_server_that_goes(serve):
    with live(serve()) as running:
        talk = RemoteConversation(APIClient(running.url), 3, GREEDY)
        list(talk.ask('one'))
    with pytest.raises(ServerConnectionError):
        list(talk.ask('two'))
    talk.close()
    assert len(talk.turns) == 2
