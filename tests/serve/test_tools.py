"""Tool calls and reasoning in answers: a scripted engine says the texts, and streams add up to whole answers."""

from __future__ import annotations

import json

import pytest

from lmdeploy.engine.request import Finish, TokenDelta
from tests.serve.fake_server import CHAT, events
from tests.serve.test_chat import SET_LIGHT, URL

CALL = '<tool_call>\n{"name": "set_light", "arguments": {"on": true}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "set_light", "arguments": {"on": false}}\n</tool_call>'


class Scripted:
    """An engine client that gives one text, so many tokens at a time."""

    def __init__(self, tokens: list[int], step: int) -> None:
        self.tokens, self.step = tokens, step

    async def submit(self, request):
        for i in range(0, len(self.tokens), self.step):
            last = i + self.step >= len(self.tokens)
            yield TokenDelta(request.id, self.tokens[i:i + self.step], Finish('stop') if last else None,
                             prompt_len=len(request.tokens))

    def abort(self, name: str) -> None:
        raise AssertionError('nothing is aborted here')


def say(server, text: str, step: int = 1) -> None:
    """From now on every answer is ``text``."""
    tokens = server.frontend.tokenizer.encode(text, add_bos=False)
    server.frontend.client = Scripted(tokens, step)


def put_together(chunks: list[dict]) -> dict:
    """What OpenAI's clients make of a stream's deltas."""
    message: dict = {'content': '', 'reasoning_content': '', 'tool_calls': []}
    finish = None
    for chunk in chunks:
        [choice] = chunk['choices']
        delta = choice['delta']
        message['content'] += delta.get('content') or ''
        message['reasoning_content'] += delta.get('reasoning_content') or ''
        for call in delta.get('tool_calls') or ():
            if call['index'] == len(message['tool_calls']):
                assert call['id'] and call['type'] == 'function'
                message['tool_calls'].append({'name': call['function']['name'], 'arguments': ''})
            message['tool_calls'][call['index']]['arguments'] += call['function'].get('arguments', '')
        finish = choice['finish_reason'] or finish
    return message | {'finish': finish}


def both_ways(server, body: dict) -> dict:
    """The answer, after checking that its stream is the same."""
    choice = server.post(URL, body).json()['choices'][0]
    message = choice['message']
    whole = {'content': message['content'] or '', 'reasoning_content': message['reasoning_content'] or '',
             'tool_calls': [call['function'] for call in message['tool_calls'] or ()],
             'finish': choice['finish_reason']}
    assert put_together(events(server.post(URL, body | {'stream': True}).text)[:-1]) == whole
    return whole


@pytest.mark.parametrize('step', [1, 2, 5, 1000])
@pytest.mark.parametrize(('text', 'content', 'reasoning', 'arguments', 'finish'), [
    ('plain', 'plain', '', [], 'stop'),
    (CALL, '', '', [True], 'tool_calls'),
    ('I will.' + CALL, 'I will.', '', [True], 'tool_calls'),
    (f'{CALL}\n{OTHER}', '', '', [True, False], 'tool_calls'),
    ('<think>hm</think>yes', 'yes', 'hm', [], 'stop'),
    (f'<think>a\nb</think>{CALL}', '', 'a\nb', [True], 'tool_calls'),
    ('<tool_call>no json', '<tool_call>no json', '', [], 'stop'),
])
def test_answers_are_parted_the_same_way_streamed_or_not(serve, step, text, content, reasoning, arguments, finish):
    server = serve(tool_parser='qwen', reasoning_parser='default')
    say(server, text, step)
    answer = both_ways(server, CHAT | {'tools': [SET_LIGHT]})
    assert (answer['content'], answer['reasoning_content'], answer['finish']) == (content, reasoning, finish)
    assert [json.loads(call['arguments'])['on'] for call in answer['tool_calls']] == arguments
    assert all(call['name'] == 'set_light' for call in answer['tool_calls'])


def test_without_tools_or_with_none_a_call_is_text(serve):
    server = serve(tool_parser='qwen', reasoning_parser='none')
    say(server, CALL)
    for body in (CHAT, CHAT | {'tools': [SET_LIGHT], 'tool_choice': 'none'}):
        answer = both_ways(server, body)
        assert answer['content'] == CALL and answer['finish'] == 'stop'


@pytest.mark.parametrize('step', [1, 3, 1000])
@pytest.mark.parametrize(('parallel', 'arguments'), [(None, [True, False]), (True, [True, False]), (False, [True])])
def test_without_parallel_calls_there_is_one(serve, step, parallel, arguments):
    server = serve(tool_parser='qwen')
    say(server, f'{CALL}\n{OTHER}', step)
    answer = both_ways(server, CHAT | {'tools': [SET_LIGHT], 'parallel_tool_calls': parallel})
    assert [json.loads(call['arguments'])['on'] for call in answer['tool_calls']] == arguments
    assert answer['finish'] == 'tool_calls'


def test_a_subset_of_tools_may_be_allowed(serve):
    server = serve(tool_parser='qwen')
    say(server, CALL)
    other = {'type': 'function', 'function': {'name': 'other'}}
    allowed = {'type': 'allowed_tools', 'allowed_tools': {
        'mode': 'auto', 'tools': [{'type': 'function', 'function': {'name': 'set_light'}}]}}
    answer = both_ways(server, CHAT | {'tools': [SET_LIGHT, other], 'tool_choice': allowed})
    assert [call['name'] for call in answer['tool_calls']] == ['set_light']


def test_reasoning_tokens_are_counted(serve):
    server = serve(reasoning_parser='default')
    say(server, '<think>one two three</think>four')
    usage = server.post(URL, CHAT).json()['usage']
    details = usage['completion_tokens_details']
    assert 0 < details['reasoning_tokens'] < usage['completion_tokens']


def test_a_conversation_with_calls_and_results_is_rendered(serve):
    server = serve(tool_parser='qwen')
    say(server, 'It is on.')
    call = {'id': 'c1', 'type': 'function', 'function': {'name': 'set_light', 'arguments': '{"on": true}'}}
    conversation = [*CHAT['messages'], {'role': 'assistant', 'content': None, 'tool_calls': [call]},
                    {'role': 'tool', 'tool_call_id': 'c1', 'content': 'done'}]
    answer = both_ways(server, CHAT | {'messages': conversation, 'tools': [SET_LIGHT]})
    assert answer['content'] == 'It is on.'
