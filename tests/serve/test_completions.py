"""/v1/completions: raw prompts, lists of them, echo, and streams that add up."""

from __future__ import annotations

import pytest

from tests.serve.fake_server import MODEL, events
from tests.serve.test_chat import expected
from tests.serve.test_edge import shape

URL = '/v1/completions'
ASK = {'model': MODEL, 'prompt': 'hello', 'max_tokens': 9}


def test_one_prompt(serve):
    server = serve()
    body = server.post(URL, ASK).json()
    ids = server.frontend.tokenizer.encode('hello')
    tokens, reason = expected(server, ids, 9)
    assert body['object'] == 'text_completion' and body['id'].startswith('cmpl-')
    [choice] = body['choices']
    assert choice['index'] == 0 and choice['finish_reason'] == reason and choice['logprobs'] is None
    assert choice['text'].strip() == server.frontend.tokenizer.decode(tokens).strip()
    assert (body['usage']['prompt_tokens'], body['usage']['completion_tokens']) == (len(ids), len(tokens))


def test_lists_of_prompts_have_a_choice_each_and_streams_add_up(serve):
    server = serve()
    for prompt, count in (('a', 1), (['a', 'b c', 'def'], 3), ([5, 6, 7], 1), ([[5, 6], [7]], 2)):
        body = ASK | {'prompt': prompt, 'n': 2}
        whole = server.post(URL, body).json()
        assert [c['index'] for c in whole['choices']] == list(range(2 * count))
        *pieces, usage, done = events(
            server.post(URL, body | {'stream': True, 'stream_options': {'include_usage': True}}).text)
        assert done == '[DONE]' and usage['choices'] == [] and usage['usage'] == whole['usage']
        texts = dict.fromkeys(range(2 * count), '')
        for piece in pieces:
            [choice] = piece['choices']
            texts[choice['index']] += choice['text']
        assert texts == {c['index']: c['text'] for c in whole['choices']}
    assert server.settled()


def test_echo_repeats_the_prompt(serve):
    server = serve()
    plain = server.post(URL, ASK).json()['choices'][0]['text']
    assert server.post(URL, ASK | {'echo': True}).json()['choices'][0]['text'] == 'hello' + plain
    streamed = events(server.post(URL, ASK | {'echo': True, 'stream': True}).text)[:-1]
    assert ''.join(c['choices'][0]['text'] for c in streamed) == 'hello' + plain
    assert server.post(URL, ASK | {'prompt': [5], 'echo': True, 'max_tokens': 1}).json()['choices'][0]['text']


def test_the_default_is_sixteen_tokens(serve):
    body = serve().post(URL, {'model': MODEL, 'prompt': [3], 'ignore_eos': True}).json()
    assert body['usage']['completion_tokens'] == 16


def test_token_ids_come_back_when_asked_for(serve):
    server = serve()
    tokens, _ = expected(server, [5, 6], 9)
    body = ASK | {'prompt': [5, 6], 'return_token_ids': True}
    assert server.post(URL, body).json()['choices'][0]['token_ids'] == tokens
    streamed = events(server.post(URL, body | {'stream': True}).text)[:-1]
    assert sum((c['choices'][0]['token_ids'] for c in streamed), []) == tokens


@pytest.mark.parametrize(('change', 'param', 'code'), [
    ({'prompt': []}, 'prompt', 'invalid_request'),
    ({'prompt': ['a', 1]}, 'prompt.1', 'invalid_request'),
    ({'prompt': ''}, None, 'invalid_request'),
    ({'prompt': [[]]}, None, 'invalid_request'),
    ({'prompt': [-1]}, 'prompt.0', 'invalid_request'),
    ({'prompt': [303]}, None, 'invalid_request'),
    ({'suffix': 'x'}, 'suffix', 'unsupported_feature'),
    ({'best_of': 2}, 'best_of', 'unsupported_feature'),
    ({'echo': True, 'logprobs': 1}, 'echo', 'unsupported_feature'),
    ({'logprobs': True}, 'logprobs', 'invalid_request'),
    ({'max_tokens': 0}, 'max_tokens', 'invalid_request'),
])
def test_refusals(serve, change, param, code):
    body = shape(serve().post(URL, ASK | change), 400, code)
    if param:
        assert body['param'] == param


def test_one_bad_prompt_of_a_list_fails_the_request_before_anything_runs(serve):
    server = serve()
    shape(server.post(URL, ASK | {'prompt': ['a', 'x ' * 500]}), 400, 'context_length_exceeded')
    assert server.client.stats().steps == 0
