"""/v1/responses: what fields do, how input is read, the shape of answers and streams, and what is remembered."""

from __future__ import annotations

import json

import pytest

from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.body import read
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.openai.responses_convert import conversation
from lmdeploy.serve.openai.responses_protocol import ResponsesRequest
from lmdeploy.serve.openai.responses_store import ResponseStore
from tests.serve.fake_server import MODEL, SESSION, named_events
from tests.serve.test_blocks import openai_client
from tests.serve.test_edge import shape
from tests.serve.test_tools import CALL, OTHER, say

URL = '/v1/responses'
ASK = {'model': MODEL, 'max_output_tokens': 8, 'input': 'hello'}
TOOL = {'type': 'function', 'name': 'set_light', 'description': 'light', 'strict': True, 'parameters': {
    'type': 'object', 'properties': {'on': {'type': 'boolean'}}, 'required': ['on'], 'additionalProperties': False}}


def streamed(server, body):
    """The response at the end of a stream, whose output was put together from the deltas as well."""
    events = named_events(server.post(URL, body | {'stream': True}).text)
    assert [event['sequence_number'] for event in events] == list(range(len(events)))
    created, running, *steps, end = events
    assert (created['type'], running['type']) == ('response.created', 'response.in_progress')
    assert created['response'] == running['response']
    assert created['response']['status'] == 'in_progress' and created['response']['output'] == []
    response = end['response']
    assert end['type'] == {'completed': 'response.completed'}.get(response['status'], 'response.incomplete')
    assert openai_client(steps) == response['output'] and created['response']['id'] == response['id']
    return response


def plain(response):
    """A response without what differs from one to the next."""
    assert response['id'].startswith('resp_') and response['created_at'] > 0
    for item in response['output']:
        assert item.pop('id').partition('_')[0] == {'message': 'msg', 'reasoning': 'rs', 'function_call': 'fc'}[
            item['type']]
        assert item.pop('call_id', 'call_').startswith('call_')
    return {key: value for key, value in response.items() if key not in ('id', 'created_at', 'completed_at')}


def both_ways(server, body):
    """The response, after checking that its stream is the same."""
    answered = server.post(URL, body)
    assert answered.status_code == 200, answered.text
    whole = answered.json()
    found = json.loads(json.dumps(whole))
    assert plain(streamed(server, body)) == plain(found)
    return whole


def read_input(items, before=()):
    body, _ = read(ResponsesRequest, ASK | {'input': items})
    return conversation(body, before, Limits())


def test_the_answer_has_openai_s_shape(serve):
    server = serve()
    chat = server.post('/v1/chat/completions', {'model': MODEL, 'max_tokens': 8, 'messages': [
        {'role': 'user', 'content': 'hello'}]}).json()
    response = plain(both_ways(server, ASK))
    tokens = chat['usage']
    assert response == {
        'object': 'response', 'status': 'incomplete', 'background': False, 'error': None, 'model': MODEL,
        'incomplete_details': {'reason': 'max_output_tokens'}, 'instructions': None, 'max_output_tokens': 8,
        'output': [{'type': 'message', 'status': 'incomplete', 'role': 'assistant', 'content': [
            {'type': 'output_text', 'text': chat['choices'][0]['message']['content'], 'annotations': [],
             'logprobs': []}]}],
        'parallel_tool_calls': True, 'previous_response_id': None, 'reasoning': {'effort': None, 'summary': None},
        'service_tier': 'default', 'store': True, 'temperature': 0.7, 'text': {'format': {'type': 'text'}},
        'tool_choice': 'auto', 'tools': [], 'top_logprobs': 0, 'top_p': 1.0, 'truncation': 'disabled', 'user': None,
        'metadata': {}, 'usage': {
            'input_tokens': tokens['prompt_tokens'], 'output_tokens': 8, 'total_tokens': tokens['total_tokens'],
            'input_tokens_details': {'cached_tokens': 0, 'cache_write_tokens': 0},
            'output_tokens_details': {'reasoning_tokens': 0}}}
    assert server.settled()


def test_parameters_act_and_are_told(serve, monkeypatch):
    server = serve(tool_parser='qwen')
    seen = []
    submit = server.client.submit
    monkeypatch.setattr(server.client, 'submit', lambda request: seen.append(request.params) or submit(request))
    body = ASK | {'temperature': 0.5, 'top_p': 0.6, 'tools': [TOOL], 'tool_choice': {
        'type': 'allowed_tools', 'mode': 'auto', 'tools': [{'type': 'function', 'name': 'set_light'}]},
        'metadata': {'a': 'b'}, 'user': 'me', 'instructions': 'be brief', 'reasoning': {'effort': 'low'},
        'text': {'format': {'type': 'text'}, 'verbosity': 'low'}, 'store': False}
    found = server.post(URL, body).json()
    assert (seen[0].temperature, seen[0].top_p, seen[0].max_new_tokens) == (0.5, 0.6, 8)
    for key in ('temperature', 'top_p', 'tools', 'tool_choice', 'metadata', 'user', 'instructions', 'text', 'store'):
        assert found[key] == body[key], key
    assert found['reasoning'] == {'effort': 'low', 'summary': None}
    server.post(URL, ASK | {'temperature': 0})
    server.post(URL, ASK | {'temperature': None, 'top_p': None, 'max_output_tokens': None, 'store': False})
    assert seen[1].greedy and (seen[2].temperature, seen[2].top_k) == (0.7, 40)
    assert seen[2].max_new_tokens > SESSION // 2


@pytest.mark.parametrize('step', [1, 3, 1000])
@pytest.mark.parametrize(('text', 'kinds'), [
    ('plain', ['message']),
    (f'<think>hm</think>I will.{CALL}', ['reasoning', 'message', 'function_call']),
    (f'{CALL}\n{OTHER}', ['function_call', 'function_call']),
])
def test_answers_are_items(serve, step, text, kinds):
    server = serve(tool_parser='qwen', reasoning_parser='default')
    say(server, text, step)
    response = both_ways(server, ASK | {'tools': [TOOL], 'max_output_tokens': 100})
    assert [item['type'] for item in response['output']] == kinds and response['status'] == 'completed'
    assert response['completed_at'] >= response['created_at'] and response['incomplete_details'] is None
    assert all(item['status'] == 'completed' for item in response['output'])
    calls = [item for item in response['output'] if item['type'] == 'function_call']
    assert [json.loads(call['arguments'])['on'] for call in calls] == [True, False][:len(calls)]
    assert len({call['call_id'] for call in calls} | {call['id'] for call in calls}) == 2 * len(calls)
    if 'reasoning' in kinds:
        assert response['output'][0]['content'] == [{'type': 'reasoning_text', 'text': 'hm'}]
        assert response['usage']['output_tokens_details']['reasoning_tokens'] > 0


def test_one_call_at_most_where_that_is_asked_for(serve):
    server = serve(tool_parser='qwen')
    say(server, f'{CALL}\n{OTHER}')
    [call] = both_ways(server, ASK | {'tools': [TOOL], 'parallel_tool_calls': False})['output']
    assert call['arguments'] == '{"on": true}'


@pytest.mark.parametrize('choice', ['required', {'type': 'function', 'name': 'set_light'}])
def test_a_call_can_be_enforced(serve, choice):
    pytest.importorskip('llguidance')
    response = serve().post(URL, ASK | {'tools': [TOOL], 'tool_choice': choice, 'max_output_tokens': 200}).json()
    [call] = response['output'][:1]
    assert (call['type'], call['name']) == ('function_call', 'set_light')
    if response['status'] == 'completed':
        assert isinstance(json.loads(call['arguments'])['on'], bool)


@pytest.mark.parametrize(('form', 'kind'), [
    ({'type': 'json_schema', 'name': 'x', 'schema': {'enum': ['red', 'green']}}, str),
    ({'type': 'json_schema', 'name': 'x', 'strict': True, 'schema': {
        'type': 'object', 'properties': {'a': {'type': 'boolean'}}, 'required': ['a'],
        'additionalProperties': False}}, dict),
])
def test_the_text_can_have_a_form(serve, form, kind):
    pytest.importorskip('llguidance')
    response = both_ways(serve(), ASK | {'max_output_tokens': 150, 'text': {'format': form}})
    assert response['text']['format'] == form
    if response['status'] == 'completed':
        assert isinstance(json.loads(response['output'][0]['content'][0]['text']), kind)


def test_input_items_become_messages():
    call = {'type': 'function_call', 'id': 'fc_1', 'call_id': 'c1', 'name': 'f', 'arguments': '{}'}
    thought = {'type': 'reasoning', 'id': 'rs_1', 'summary': [], 'content': [{'type': 'reasoning_text', 'text': 'hm'}]}
    said = {'type': 'message', 'id': 'msg_1', 'role': 'assistant', 'status': 'completed',
            'content': [{'type': 'output_text', 'text': 'Yes.', 'annotations': []}]}
    found = read_input([
        {'role': 'developer', 'content': 'be brief'},
        {'role': 'user', 'content': [{'type': 'input_text', 'text': 'a'}, {'type': 'input_text', 'text': 'b'}]},
        thought, said, call, {'type': 'function_call_output', 'call_id': 'c1', 'output': 'done'},
        {'role': 'user', 'content': 'x'}, {'role': 'user', 'content': 'y'}])
    assert found == [
        {'role': 'developer', 'content': 'be brief'}, {'role': 'user', 'content': 'a\nb'},
        {'role': 'assistant', 'content': 'Yes.', 'reasoning_content': 'hm', 'tool_calls': [
            {'id': 'c1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}]},
        {'role': 'tool', 'tool_call_id': 'c1', 'name': 'f', 'content': 'done'},
        {'role': 'user', 'content': 'x'}, {'role': 'user', 'content': 'y'}]
    again = read_input([{'type': 'function_call_output', 'call_id': 'c1', 'output': [
        {'type': 'input_text', 'text': 'more'}]}], before=found)
    assert again[:-1] == found and again[-1]['name'] == 'f'
    with pytest.raises(HttpError, match='two calls'):
        read_input([call, call])


@pytest.mark.parametrize(('change', 'param'), [
    ({'input': []}, 'input'),
    ({'input': 7}, 'input'),
    ({'input': [{'role': 'tool', 'content': 'x'}]}, 'input.0.role'),
    ({'input': [{'role': 'user', 'content': [{'type': 'input_image', 'file_id': 'x'}]}]}, 'input.0.content.0'),
    ({'input': [{'role': 'user', 'content': [{'type': 'input_file', 'file_id': 'x'}]}]}, 'input.0.content.0'),
    ({'input': [{'role': 'user', 'content': [{'type': 'input_text'}]}]}, 'input.0.content.0.text'),
    ({'input': [{'type': 'item_reference', 'id': 'x'}]}, 'input.0'),
    ({'input': [{'type': 'function_call_output', 'call_id': 'x', 'output': 'y'}]}, 'input.0.call_id'),
    ({'input': [{'type': 'function_call', 'call_id': 'x'}]}, 'input.0.name'),
    ({'max_output_tokens': 0}, 'max_output_tokens'),
    ({'temperature': 2.5}, 'temperature'),
    ({'top_p': 0}, 'top_p'),
    ({'tools': [{'type': 'web_search'}]}, 'tools.0.type'),
    ({'tools': [TOOL, TOOL]}, 'tools'),
    ({'tools': [TOOL]}, 'tools'),  # the model's template calls for no parser
    ({'tool_choice': 'required'}, 'tool_choice'),
    ({'tools': [TOOL], 'tool_choice': {'type': 'function', 'name': 'g'}}, 'tool_choice'),
    ({'tools': [TOOL], 'tool_choice': 'required', 'text': {'format': {'type': 'json_object'}}}, 'text.format'),
    ({'text': {'format': {'type': 'json_schema'}}}, 'text.format'),
    ({'text': {'format': {'type': 'xml'}}}, 'text.format.type'),
    ({'reasoning': {'summary': 'detailed'}}, 'reasoning.summary'),
    ({'include': ['message.output_text.logprobs']}, 'include.0'),
    ({'metadata': {'a': 'x' * 513}}, 'metadata'),
    ({'metadata': {str(i): '' for i in range(17)}}, 'metadata'),
    ({'background': True}, 'background'),
    ({'conversation': 'x'}, 'conversation'),
    ({'prompt': {'id': 'x'}}, 'prompt'),
    ({'truncation': 'auto'}, 'truncation'),
    ({'top_logprobs': 2}, 'top_logprobs'),
    ({'stream_options': {'include_obfuscation': True}}, 'stream_options.include_obfuscation'),
])
def test_what_cannot_be_done_is_refused_and_named(serve, change, param):
    server = serve()
    response = server.post(URL, ASK | change)
    assert response.status_code == 400 and response.json()['error']['param'] == param, response.text
    assert server.client.stats().accepted == 0


def test_wishes_and_labels_change_nothing_and_unknown_fields_are_counted(serve):
    server = serve()
    known = server.post(URL, ASK).json()['output'][0]['content']
    wishes = {'prompt_cache_key': 'x', 'safety_identifier': 'y', 'service_tier': 'auto', 'truncation': 'disabled',
              'include': ['reasoning.encrypted_content'], 'background': False, 'top_logprobs': 0,
              'stream_options': {'include_obfuscation': False}, 'text': {'verbosity': 'high'}, 'tools': []}
    assert server.post(URL, ASK | wishes).json()['output'][0]['content'] == known
    assert server.context.metrics.unknown_fields == 0
    assert server.post(URL, ASK | {'nonsense': 1}).status_code == 200 and server.context.metrics.unknown_fields == 1


@pytest.mark.parametrize('stream', [False, True])
def test_a_response_goes_on_from_another(serve, monkeypatch, stream):
    server = serve(session_len=512, num_blocks=128)
    seen = []
    prepare = server.frontend.prepare
    monkeypatch.setattr(server.frontend, 'prepare', lambda p, *a, **k: seen.append(p.messages) or prepare(p, *a, **k))

    def ask(**change):
        body = ASK | change
        return streamed(server, body) if stream else server.post(URL, body).json()

    first = ask(instructions='be brief')
    second = ask(input='and?', previous_response_id=first['id'])
    third = ask(input='so?', previous_response_id=second['id'], store=False)
    texts = [response['output'][0]['content'][0]['text'] for response in (first, second)]
    conversation = [{'role': 'user', 'content': 'hello'}, {'role': 'assistant', 'content': texts[0]},
                    {'role': 'user', 'content': 'and?'}, {'role': 'assistant', 'content': texts[1]},
                    {'role': 'user', 'content': 'so?'}]
    assert seen == [[{'role': 'system', 'content': 'be brief'}, *conversation[:1]], conversation[:3], conversation]
    assert second['previous_response_id'] == first['id']
    assert server.ask('GET', f'{URL}/{first["id"]}').json() == first
    shape(server.ask('GET', f'{URL}/{third["id"]}'), 404, 'response_not_found')
    assert server.ask('DELETE', f'{URL}/{first["id"]}').json() == {
        'id': first['id'], 'object': 'response', 'deleted': True}
    for method in ('GET', 'DELETE'):
        shape(server.ask(method, f'{URL}/{first["id"]}'), 404, 'response_not_found')
    gone = server.post(URL, ASK | {'previous_response_id': first['id']})
    shape(gone, 404, 'response_not_found')
    assert gone.json()['error']['param'] == 'previous_response_id'
    assert server.post(URL, ASK | {'previous_response_id': second['id']}).status_code == 200  # it stands for itself
    assert server.ask('GET', f'{URL}/{second["id"]}?stream=true').status_code == 400


def test_a_call_and_its_result_go_on_from_a_response(serve):
    server = serve(tool_parser='qwen', session_len=1024, num_blocks=128)
    say(server, CALL)
    first = server.post(URL, ASK | {'tools': [TOOL]}).json()
    say(server, 'It is on.')
    output = {'type': 'function_call_output', 'call_id': first['output'][0]['call_id'], 'output': 'done'}
    second = server.post(URL, ASK | {'tools': [TOOL], 'input': [output], 'previous_response_id': first['id']})
    assert second.json()['output'][0]['content'][0]['text'] == 'It is on.'
    alone = server.post(URL, ASK | {'tools': [TOOL], 'input': [output]})
    shape(alone, 400, 'invalid_request')
    whole = server.post(URL, ASK | {'tools': [TOOL], 'input': [
        {'role': 'user', 'content': 'hello'}, *first['output'], output]}).json()
    assert whole['usage']['input_tokens'] == second.json()['usage']['input_tokens']  # either way, the same prompt


def test_an_answer_that_was_begun_goes_on_without_a_break(serve):
    server = serve(session_len=512, num_blocks=128)
    begun = [{'role': 'user', 'content': 'hello'}, {'role': 'assistant', 'content': 'My '}]
    first = server.post(URL, ASK | {'input': begun}).json()
    [*_, last] = server.post(URL, ASK | {'previous_response_id': first['id']}).json()['output']
    assert last['status'] == 'incomplete'
    text = first['output'][0]['content'][0]['text']
    both = [begun[0], {'role': 'assistant', 'content': f'My {text}'}, {'role': 'user', 'content': 'hello'}]
    counts = [server.post(URL, body).json()['usage']['input_tokens']
              for body in (ASK | {'previous_response_id': first['id']}, ASK | {'input': both})]
    assert counts[0] == counts[1]


def test_responses_belong_to_their_key(serve):
    server = serve(keys=KeyRing(['a', 'b']))
    own, other = {'x-api-key': 'a'}, {'x-api-key': 'b'}
    first = server.post(URL, ASK, headers=own).json()
    for method in ('GET', 'DELETE'):
        shape(server.ask(method, f'{URL}/{first["id"]}'), 401, 'invalid_api_key')
        shape(server.ask(method, f'{URL}/{first["id"]}', headers=other), 404, 'response_not_found')
    shape(server.post(URL, ASK | {'previous_response_id': first['id']}, headers=other), 404, 'response_not_found')
    assert server.ask('GET', f'{URL}/{first["id"]}', headers=own).json() == first


def test_the_least_recently_used_are_forgotten():
    store = ResponseStore(Limits(responses=2, response_bytes=1000))
    message = [{'role': 'user', 'content': 'x'}]
    store.keep('a', '1', b'x' * 100, message)
    store.keep('a', '2', b'x' * 100, message)
    assert store.get('a', '1') is not None
    store.keep('a', '3', b'x' * 100, message)
    assert [store.get('a', name) is not None for name in '123'] == [True, False, True]
    store.keep('b', '4', b'x' * 100, message)
    assert store.get('a', '4') is None and store.get('a', '1') is not None  # of another key
    store.keep('a', '5', b'x' * 2000, message)
    assert store.get('a', '5') is None and store.get('a', '3') is not None  # too large to be kept at all
    store.keep('a', '6', b'x' * 900, message)
    assert [store.get('a', name) is not None for name in '136'] == [False, False, True]
    assert store.delete('a', '6') and not store.delete('a', '6') and not store.delete('c', '6')
    store.keep('a', '7', b'x' * 900, message)  # what was deleted holds no room
    assert store.get('a', '7') is not None and store.get('a', '7').messages == tuple(message)


def test_an_engine_that_dies_fails_the_response(serve):
    shape(serve(fail_at=1).post(URL, ASK), 503, 'engine_unavailable')
    server = serve(fail_at=4)
    events = named_events(server.post(URL, ASK | {'stream': True}).text)
    assert [event['sequence_number'] for event in events] == list(range(len(events)))
    last = events[-1]
    assert last['type'] == 'response.failed' and last['response']['status'] == 'failed'
    assert last['response']['error']['code'] == 'server_error' and 'LMD-519' in last['response']['error']['message']
    shape(server.ask('GET', f'{URL}/{last["response"]["id"]}'), 404, 'response_not_found')
