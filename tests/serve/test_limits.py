"""Limits: every entry of the table has a case here, at the limit and one beyond it."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.serve.limits import Limits
from tests.serve.fake_server import CHAT, MODEL

TOOL = {'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}


def tool(name):
    return {'type': 'function', 'function': {'name': name}}


CASES = {  # entry: (its value in the test, route, body at the limit, body beyond)
    'messages': (2, 'chat', {'messages': CHAT['messages'] * 2}, {'messages': CHAT['messages'] * 3}),
    'prompts': (2, 'completions', {'prompt': ['a', 'b']}, {'prompt': ['a', 'b', 'c']}),
    'n': (2, 'chat', {'n': 2}, {'n': 3}),
    'answers': (4, 'completions', {'prompt': ['a', 'b'], 'n': 2}, {'prompt': ['a', 'b'], 'n': 3}),
    'tokens': (16, 'chat', {'n': 2, 'max_tokens': 8}, {'n': 2, 'max_tokens': 9}),
    'max_tokens': (9, 'chat', {'max_tokens': 9}, {'max_tokens': 10}),
    'stop': (2, 'chat', {'stop': ['x', 'y']}, {'stop': ['x', 'y', 'z']}),
    'stop_chars': (5, 'chat', {'stop': 'abcde'}, {'stop': ['abcdef']}),
    'stop_token_ids': (2, 'chat', {'stop_token_ids': [1, 2]}, {'stop_token_ids': [1, 2, 3]}),
    'logit_bias': (2, 'chat', {'logit_bias': {'1': 1, '2': -1}}, {'logit_bias': {'1': 1, '2': 1, '3': 1}}),
    'logprobs': (2, 'chat', {'logprobs': True, 'top_logprobs': 2}, {'logprobs': True, 'top_logprobs': 3}),
    'tools': (1, 'chat', {'tools': [tool('a')], 'tool_choice': 'none'}, {'tools': [tool('a'), tool('b')]}),
    'tool_bytes': (100, 'chat', {'tools': [tool('a')], 'tool_choice': 'none'}, {'tools': [tool('a' * 100)]}),
    'name_chars': (4, 'chat', {'user': 'abcd'}, {'user': 'abcde'}),
}
ELSEWHERE = {  # entries with tests of their own, in the modules named
    'body_bytes': 'test_edge', 'header_bytes': 'test_edge', 'header_count': 'test_edge', 'json_depth': 'test_edge',
    'json_values': 'test_bodies', 'json_numbers': 'test_bodies', 'json_keys': 'test_bodies',
    'body_seconds': 'test_edge', 'body_idle_seconds': 'test_edge',
    'stream_bytes': 'test_streams', 'stall_seconds': 'test_streams',
    'sessions': 'test_interactive', 'session_bytes': 'test_interactive',
    'responses': 'test_responses', 'response_bytes': 'test_responses',
    'queue': 'test_admission', 'request_seconds': 'test_admission', 'key_requests': 'test_admission',
    'key_requests_per_minute': 'test_admission', 'key_tokens_per_minute': 'test_admission',
    'connections': 'test_live', 'address_connections': 'test_live', 'bad_keys_per_minute': 'test_edge',
    'images': 'test_images', 'image_bytes': 'test_images', 'images_bytes': 'test_images', 'image_pixels': 'test_images',
    'images_pixels': 'test_images', 'fetch_seconds': 'test_images',
}


def test_every_entry_has_its_test():
    assert CASES.keys() | ELSEWHERE.keys() == {spec.name for spec in fields(Limits)}


@pytest.mark.parametrize('name', CASES)
def test_at_the_limit_and_beyond(serve, name):
    most, route, good, bad = CASES[name]
    server = serve(limits=replace(Limits(), **{name: most}))
    path = {'chat': '/v1/chat/completions', 'completions': '/v1/completions'}[route]
    base = CHAT if route == 'chat' else {'model': MODEL, 'prompt': 'a', 'max_tokens': 2}
    assert server.post(path, base | good).status_code == 200
    before = server.client.stats().steps
    refused = server.post(path, base | bad)
    assert refused.status_code == 400, refused.text
    assert 'limit' in refused.json()['message']
    assert server.client.stats().steps == before
    assert len(refused.content) < 16 << 10


HUGE = [math.nan, math.inf, -0.0, True, 'a', None, [], {}, 2**63, 10**30, -1, 0, 1, 2, 1e308, 0.5]
NUMBERS = ['temperature', 'top_p', 'top_k', 'min_p', 'n', 'seed', 'max_tokens', 'max_completion_tokens',
           'min_new_tokens', 'presence_penalty', 'frequency_penalty', 'repetition_penalty', 'top_logprobs',
           'session_id', 'stop', 'stop_token_ids', 'logit_bias', 'messages', 'model', 'stream', 'stream_options',
           'tools', 'tool_choice', 'response_format', 'user', 'logprobs', 'ignore_eos', 'skip_special_tokens',
           'input_ids', 'enable_thinking', 'chat_template_kwargs', 'reasoning_effort']


@pytest.mark.parametrize('name', NUMBERS)
def test_no_value_of_any_field_breaks_the_server(serve, name):
    import json

    server = serve(limits=replace(Limits(), request_seconds=5))
    for value in HUGE:
        body = json.dumps(CHAT | {'max_tokens': 2} | {name: value})
        response = server.ask('POST', '/v1/chat/completions', content=body,
                              headers={'content-type': 'application/json'})
        assert response.status_code in (200, 400, 404), (value, response.text)
        assert len(response.content) < 16 << 10
    assert server.settled()


def test_changes_and_the_printed_table():
    limits = Limits().change(['body_bytes=1000', 'key-requests=3'])
    assert (limits.body_bytes, limits.key_requests) == (1000, 3)
    assert len(limits.lines()) == len(fields(Limits)) and '1,000 bytes' in limits.lines()[0]
    for bad in ('nothing=1', 'n=0', 'n=-1', 'n=x', 'n', 'n=', 'n=1e3', 'n=' + '9' * 50, 'n=²'):
        with pytest.raises(ConfigError, match='LMD-527'):
            Limits().change([bad])
