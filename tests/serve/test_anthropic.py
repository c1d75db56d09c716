"""/v1/messages and count_tokens: what fields do, how conversations are read, the shape of answers and errors."""

from __future__ import annotations

import json

import pytest

from lmdeploy.engine.fake import continuation
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.serve.anthropic.convert import messages
from lmdeploy.serve.anthropic.protocol import MessagesRequest
from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.body import read
from lmdeploy.serve.limits import Limits
from tests.serve.fake_server import MODEL, SESSION, VOCAB, named_events
from tests.serve.test_blocks import anthropic_client
from tests.serve.test_tools import CALL, OTHER, say

URL, COUNT = '/v1/messages', '/v1/messages/count_tokens'
ASK = {'model': MODEL, 'max_tokens': 8, 'messages': [{'role': 'user', 'content': 'hello'}]}
TOOL = {'name': 'set_light', 'description': 'light', 'input_schema': {
    'type': 'object', 'properties': {'on': {'type': 'boolean'}}, 'required': ['on'], 'additionalProperties': False}}


def failed(response, status, kind, *words):
    """The message of an error, which has Anthropic's shape and nothing else."""
    body = response.json()
    assert response.status_code == status, response.text
    assert body.keys() == {'type', 'error', 'request_id'} and body['type'] == 'error'
    assert body['error'].keys() == {'type', 'message'} and body['error']['type'] == kind, body
    assert body['request_id'] == response.headers['x-request-id']
    for word in words:
        assert word in body['error']['message']
    return body['error']['message']


def streamed(server, body):
    """The message that a client has at the end of a stream."""
    response = server.post(URL, body | {'stream': True})
    assert response.headers['content-type'] == 'text/event-stream; charset=utf-8', response.text
    start, ping, *blocks, delta, stop = named_events(response.text)
    assert (start['type'], ping, stop) == ('message_start', {'type': 'ping'}, {'type': 'message_stop'})
    message = start['message']
    assert message['content'] == [] and message['stop_reason'] is None and message['usage']['output_tokens'] == 0
    content = anthropic_client(blocks)
    for block in content:
        if 'input' in block:
            block['input'] = json.loads(block['input'])
    assert delta['usage']['input_tokens'] == message['usage']['input_tokens']
    return message | delta['delta'] | {'usage': delta['usage'], 'content': content}


def both_ways(server, body):
    """The message, after checking that its stream is the same."""
    response = server.post(URL, body)
    assert response.status_code == 200, response.text
    whole, pieces = response.json(), streamed(server, body)
    for message in (whole, pieces):
        assert message.pop('id').startswith('msg_')
        for block in message['content']:
            assert block.pop('id', 'toolu_').startswith('toolu_')
    assert whole == pieces
    return whole


def read_messages(*turns, **more):
    body, _ = read(MessagesRequest, ASK | more | {'messages': [{'role': r, 'content': c} for r, c in turns]})
    return messages(body, Limits())


def test_the_answer_has_anthropic_s_shape(serve):
    server = serve()
    message = both_ways(server, ASK)
    ids = server.post('/tokenize', {'messages': ASK['messages']}).json()['tokens']
    tokens, _ = continuation(ids, SamplingParams(max_new_tokens=8, stop_ids=tuple(
        server.frontend.tokenizer.eos_token_ids)), VOCAB, SESSION)
    assert message == {
        'type': 'message', 'role': 'assistant', 'model': MODEL, 'stop_reason': 'max_tokens', 'stop_sequence': None,
        'content': [{'type': 'text', 'text': server.frontend.tokenizer.decode(tokens), 'citations': None}],
        'usage': {'input_tokens': len(ids), 'output_tokens': 8, 'cache_creation_input_tokens': 0,
                  'cache_read_input_tokens': 0, 'output_tokens_details': {'thinking_tokens': 0}}}
    assert server.settled()


def test_parameters_reach_the_sampler(serve, monkeypatch):
    server = serve()
    seen = []
    submit = server.client.submit
    monkeypatch.setattr(server.client, 'submit', lambda request: seen.append(request.params) or submit(request))
    for change in ({'temperature': 0.5, 'top_p': 0.6, 'top_k': 7}, {}, {'temperature': 0},
                   {'temperature': None, 'top_p': None, 'top_k': None, 'stop_sequences': None, 'metadata': None}):
        assert server.post(URL, ASK | change).status_code == 200
    assert (seen[0].temperature, seen[0].top_p, seen[0].top_k, seen[0].max_new_tokens) == (0.5, 0.6, 7, 8)
    for params in (seen[1], seen[3]):
        assert (params.temperature, params.top_p, params.top_k) == (0.7, 1.0, 40)
    assert seen[2].greedy


@pytest.mark.parametrize(('change', 'reason', 'sequence'), [
    ({}, 'end_turn', None),
    ({'stop_sequences': ['two', 'zzz']}, 'stop_sequence', 'two'),
    ({'stop_sequences': ['zzz']}, 'end_turn', None),
])
def test_stop_reasons(serve, change, reason, sequence):
    server = serve()
    say(server, 'one two three')
    message = both_ways(server, ASK | change)
    assert (message['stop_reason'], message['stop_sequence']) == (reason, sequence)
    assert message['content'][0]['text'] == ('one ' if sequence else 'one two three')


def test_a_full_context_has_a_reason_of_its_own(serve):
    message = both_ways(serve(session_len=32), ASK | {'max_tokens': 500})
    assert message['stop_reason'] == 'model_context_window_exceeded'
    assert sum(message['usage'][key] for key in ('input_tokens', 'output_tokens')) == 32


@pytest.mark.parametrize('step', [1, 3, 1000])
@pytest.mark.parametrize(('text', 'kinds', 'reason'), [
    ('plain', ['text'], 'end_turn'),
    ('', ['text'], 'end_turn'),
    (f'<think>hm</think>I will.{CALL}', ['thinking', 'text', 'tool_use'], 'tool_use'),
    (f'{CALL}\n{OTHER}', ['tool_use', 'tool_use'], 'tool_use'),
])
def test_answers_are_blocks(serve, step, text, kinds, reason):
    server = serve(tool_parser='qwen', reasoning_parser='default')
    say(server, text or '<|im_end|>', step)
    message = both_ways(server, ASK | {'tools': [TOOL]})
    assert [block['type'] for block in message['content']] == kinds and message['stop_reason'] == reason
    calls = [block for block in message['content'] if block['type'] == 'tool_use']
    assert [call['input']['on'] for call in calls] == [True, False][:len(calls)]
    assert all(call['name'] == 'set_light' for call in calls)
    if 'thinking' in kinds:
        assert message['content'][0] == {'type': 'thinking', 'thinking': 'hm', 'signature': ''}
        usage = message['usage']
        thinking = usage['output_tokens_details']['thinking_tokens']
        assert 0 < thinking < usage['output_tokens'] or step == 1000


def test_one_call_at_most_where_that_is_asked_for(serve):
    server = serve(tool_parser='qwen')
    say(server, f'{CALL}\n{OTHER}')
    choice = {'type': 'auto', 'disable_parallel_tool_use': True}
    [call] = both_ways(server, ASK | {'tools': [TOOL], 'tool_choice': choice})['content']
    assert call['input'] == {'on': True}


def test_tool_choice_none_hides_the_tools(serve):
    server = serve(tool_parser='qwen')
    say(server, CALL)
    message = both_ways(server, ASK | {'tools': [TOOL], 'tool_choice': {'type': 'none'}})
    assert message['content'][0]['text'] == CALL and message['stop_reason'] == 'end_turn'


@pytest.mark.parametrize('choice', [{'type': 'any'}, {'type': 'tool', 'name': 'set_light'},
                                    {'type': 'any', 'disable_parallel_tool_use': True}])
def test_a_call_can_be_enforced(serve, choice):
    pytest.importorskip('llguidance')
    body = ASK | {'tools': [TOOL], 'tool_choice': choice, 'max_tokens': 200}
    message = serve().post(URL, body).json()
    assert message['content'][0]['type'] == 'tool_use' and message['content'][0]['name'] == 'set_light'
    if message['stop_reason'] == 'tool_use':
        assert isinstance(message['content'][0]['input']['on'], bool)
    else:
        assert message['stop_reason'] == 'model_context_window_exceeded' or message['usage']['output_tokens'] == 200


def test_the_answer_can_be_an_instance_of_a_schema(serve):
    pytest.importorskip('llguidance')
    form = {'type': 'json_schema', 'schema': {'enum': ['red', 'green']}}
    [block] = both_ways(serve(), ASK | {'max_tokens': 60, 'output_config': {'format': form}})['content']
    assert json.loads(block['text']) in ('red', 'green')


def test_thinking_is_switched(serve, monkeypatch):
    server = serve(reasoning_parser='qwen3')
    seen = []
    prepare = server.frontend.prepare
    monkeypatch.setattr(server.frontend, 'prepare',
                        lambda *a, **k: seen.append(k['enable_thinking']) or prepare(*a, **k))
    for thinking in (None, {'type': 'enabled', 'budget_tokens': 4}, {'type': 'disabled'}, {'type': 'adaptive'}):
        assert server.post(URL, ASK | {'thinking': thinking}).status_code == 200
    assert server.post(URL, ASK | {'output_config': {'effort': 'low'}}).status_code == 200
    assert seen == [None, True, False, None, True]


def test_conversations_with_calls_results_and_thoughts():
    use = {'type': 'tool_use', 'id': 't1', 'name': 'set_light', 'input': {'on': True}}
    result = {'type': 'tool_result', 'tool_use_id': 't1', 'content': [{'type': 'text', 'text': 'a'},
                                                                      {'type': 'text', 'text': 'b'}]}
    found = read_messages(
        ('user', 'light!'),
        ('assistant', [{'type': 'thinking', 'thinking': 'hm', 'signature': ''}, {'type': 'text', 'text': 'Yes.'}, use]),
        ('user', [result, {'type': 'text', 'text': 'and?'}]),
        system=[{'type': 'text', 'text': 'be', 'cache_control': {'type': 'ephemeral'}},
                {'type': 'text', 'text': 'brief'}])
    assert found == [
        {'role': 'system', 'content': 'be\nbrief'},
        {'role': 'user', 'content': 'light!'},
        {'role': 'assistant', 'content': 'Yes.', 'reasoning_content': 'hm', 'tool_calls': [
            {'id': 't1', 'type': 'function', 'function': {'name': 'set_light', 'arguments': '{"on": true}'}}]},
        {'role': 'tool', 'tool_call_id': 't1', 'name': 'set_light', 'content': 'a\nb'},
        {'role': 'user', 'content': 'and?'}]
    found = read_messages(('user', 'x'), ('assistant', [use]), ('user', [
        {'type': 'tool_result', 'tool_use_id': 't1', 'is_error': True, 'content': 'no bulb'}]))
    assert found[1]['content'] is None and found[-1]['content'] == 'Error: no bulb'


def test_neighbours_of_one_role_are_one_turn_and_an_answer_may_be_begun(serve):
    assert read_messages(('user', 'a'), ('user', [{'type': 'text', 'text': 'b'}]), ('assistant', 'c')) == [
        {'role': 'user', 'content': 'a\nb'}, {'role': 'assistant', 'content': 'c'}]
    server = serve()
    begun = ASK | {'messages': [*ASK['messages'], {'role': 'assistant', 'content': 'My answer is'}]}
    plain, longer = (server.post(URL, body).json()['usage']['input_tokens'] for body in (ASK, begun))
    assert longer - plain == len(server.frontend.tokenizer.encode('My answer is', add_bos=False))


@pytest.mark.parametrize('change', [
    {}, {'system': 'be brief'}, {'tools': [TOOL]}, {'tools': [TOOL], 'tool_choice': {'type': 'any'}},
    {'thinking': {'type': 'disabled'}}, {'output_config': {'effort': 'high'}},
    {'messages': [*ASK['messages'], {'role': 'assistant', 'content': 'x'}, {'role': 'user', 'content': '你好'}]},
])
def test_the_count_is_that_of_the_message(serve, change):
    server = serve(tool_parser='qwen')
    body = {key: value for key, value in (ASK | change).items() if key != 'max_tokens'}
    counted = server.post(COUNT, body)
    assert counted.json() == {'input_tokens': server.post(URL, ASK | change).json()['usage']['input_tokens']}
    assert server.settled()


def test_what_is_too_long_to_answer_can_be_counted(serve):
    server = serve()
    body = ASK | {'messages': [{'role': 'user', 'content': 'one two ' * 120}]}
    failed(server.post(URL, body), 400, 'invalid_request_error', 'LMD-301')
    del body['max_tokens']
    assert server.post(COUNT, body).json()['input_tokens'] > SESSION


def user(*blocks):
    return {'messages': [{'role': 'user', 'content': [*blocks]}]}


RESULT = {'type': 'tool_result', 'tool_use_id': 'none', 'content': 'x'}
IMAGE = {'type': 'image', 'source': {'type': 'base64', 'media_type': 'image/png', 'data': 'x'}}


@pytest.mark.parametrize(('change', 'place'), [
    ({'max_tokens': None}, 'max_tokens'),
    ({'max_tokens': 0}, 'max_tokens'),
    ({'messages': []}, 'messages'),
    ({'messages': [{'role': 'tool', 'content': 'x'}]}, 'messages.0.role'),
    ({'messages': [{'role': 'user'}]}, 'messages.0.content'),
    (user({'type': 'image', 'source': {'type': 'url'}}), 'messages.0.content.0.source'),
    (user({'type': 'text'}), 'messages.0.content.0.text'),
    (user({'type': 'document', 'source': {}}), 'messages.0.content.0'),
    (user({'text': 'x'}), 'messages.0.content.0.type'),
    (user(7), 'messages.0.content.0'),
    (user(RESULT), 'messages.0.content.0.tool_use_id'),
    (user({'type': 'tool_use', 'id': 'a', 'name': 'b', 'input': {}}), 'messages.0.content.0'),
    ({'messages': [{'role': 'assistant', 'content': [RESULT]}]}, 'messages.0.content.0'),
    ({'system': [{'type': 'image'}]}, 'system.0.type'),
    ({'temperature': 3}, 'temperature'),
    ({'temperature': True}, 'temperature'),
    ({'top_p': 0}, 'top_p'),
    ({'top_k': -1}, 'top_k'),
    ({'stop_sequences': ['']}, 'stop_sequences'),
    ({'stop_sequences': ['x'] * 17}, 'stop_sequences'),
    ({'metadata': {'user_id': 'x' * 300}}, 'metadata.user_id'),
    ({'tools': [{'type': 'web_search_20250305', 'name': 'web_search'}]}, 'tools.0.type'),
    ({'tools': [{'name': 'f'}]}, 'tools.0.input_schema'),
    ({'tools': [TOOL | {'defer_loading': True}]}, 'tools.0.defer_loading'),
    ({'tools': [TOOL, TOOL]}, 'tools'),
    ({'tool_choice': {'type': 'any'}}, 'tool_choice'),
    ({'tools': [TOOL], 'tool_choice': {'type': 'tool'}}, 'tool_choice.name'),
    ({'tools': [TOOL], 'tool_choice': {'type': 'tool', 'name': 'g'}}, 'tool_choice'),
    ({'thinking': {'type': 'enabled', 'budget_tokens': 8}}, 'thinking.budget_tokens'),
    ({'thinking': {'type': 'enabled', 'display': 'omitted'}}, 'thinking.display'),
    ({'tools': [TOOL], 'tool_choice': {'type': 'any'}, 'thinking': {'type': 'enabled'}}, 'thinking'),
    ({'tools': [TOOL], 'tool_choice': {'type': 'any'},
      'output_config': {'format': {'type': 'json_schema', 'schema': {}}}}, 'output_config.format'),
    ({'mcp_servers': [{'type': 'url'}]}, 'mcp_servers'),
    ({'container': 'x'}, 'container'),
    ({'context_management': {'edits': [{'type': 'clear_tool_uses_20250919'}]}}, 'context_management'),
    ({'speed': 'fast'}, 'speed'),
    ({'inference_geo': 'eu'}, 'inference_geo'),
])
def test_what_cannot_be_done_is_refused_and_named(serve, change, place):
    server = serve(tool_parser='qwen', reasoning_parser='qwen3')
    told = failed(server.post(URL, ASK | change), 400, 'invalid_request_error')
    assert (f': {place}: ' if 'LMD-512' in told else f': {place} is not supported: ') in told
    assert server.client.stats().accepted == 0


@pytest.mark.parametrize('change', [user(IMAGE), {'messages': [
    {'role': 'user', 'content': 'x'},
    {'role': 'assistant', 'content': [{'type': 'tool_use', 'id': 'none', 'name': 'b', 'input': {}}]},
    {'role': 'user', 'content': [RESULT | {'content': [IMAGE]}]}]}])
def test_pictures_need_a_model_that_reads_them(serve, change):
    server = serve()
    assert 'LMD-304' in failed(server.post(URL, ASK | change), 400, 'invalid_request_error')
    assert server.client.stats().accepted == 0


def test_thinking_needs_a_model_that_thinks(serve):
    failed(serve().post(URL, ASK | {'thinking': {'type': 'enabled'}}), 400, 'invalid_request_error', 'thinking')


def test_wishes_and_labels_change_nothing_and_unknown_fields_are_counted(serve):
    server = serve()
    plain = server.post(URL, ASK).json()
    wishes = {'service_tier': 'auto', 'cache_control': {'type': 'ephemeral'}, 'metadata': {'user_id': 'me'},
              'system': '', 'tools': [],
              'context_management': {'edits': [{'type': 'clear_thinking_20251015', 'keep': 'all'}]}}
    headers = {'anthropic-version': '2023-06-01', 'anthropic-beta': 'x-2025-01-01'}
    found = server.post(f'{URL}?beta=true', ASK | wishes, headers=headers).json()
    assert found['content'] == plain['content'] and server.context.metrics.unknown_fields == 0
    assert server.post(URL, ASK | {'nonsense': 1}).status_code == 200 and server.context.metrics.unknown_fields == 1


def test_every_error_has_anthropic_s_shape(serve):
    server = serve(keys=KeyRing(['token']), limits=Limits(body_bytes=1000, key_requests_per_minute=1))
    for path in (URL, COUNT):
        failed(server.post(path, ASK), 401, 'authentication_error')
    key = {'x-api-key': 'token'}
    failed(server.post(URL, ASK | {'system': 'x' * 2000}, headers=key), 413, 'request_too_large')
    failed(server.post(URL, ASK | {'model': 'claude'}, headers=key), 404, 'not_found_error', 'claude', MODEL)
    failed(server.ask('POST', URL, content=b'{', headers=key | {'content-type': 'application/json'}), 400,
           'invalid_request_error', 'JSON')
    failed(server.ask('POST', URL, content=b'{}', headers=key), 415, 'invalid_request_error')
    for path in (URL, COUNT):
        refused = server.ask('GET', path, headers=key)
        failed(refused, 405, 'invalid_request_error', 'POST')
        assert refused.headers['allow'] == 'POST' and refused.headers['request-id'] == refused.headers['x-request-id']
        failed(server.post(path, ASK, headers=key | {'x-large': 'x' * 70000}), 431, 'invalid_request_error')
    assert server.post(URL, ASK, headers={'authorization': 'Bearer token'}).status_code == 200
    limited = server.post(URL, ASK, headers=key)
    failed(limited, 429, 'rate_limit_error')
    assert int(limited.headers['retry-after']) >= 1
    server.context.check_host = True
    failed(server.post(URL, ASK, headers=key | {'host': 'evil.example'}), 403, 'permission_error')
    server.context.check_host = False
    server.context.draining = True
    away = server.post(URL, ASK, headers=key)
    failed(away, 503, 'overloaded_error')
    assert away.headers['retry-after']


def test_an_engine_that_dies_is_an_error_of_anthropic_s_shape(serve):
    failed(serve(fail_at=1).post(URL, ASK), 503, 'overloaded_error')
    *_, last = named_events(serve(fail_at=4).post(URL, ASK | {'stream': True}).text)
    assert last.keys() == {'type', 'error', 'request_id'} and last['error']['type'] == 'overloaded_error'
