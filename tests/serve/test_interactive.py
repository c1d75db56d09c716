"""/v1/chat/interactive: sessions that go on, end, are cancelled, and belong to a key."""

from __future__ import annotations

import asyncio
import json

from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.limits import Limits
from tests.serve.test_edge import shape
from tests.serve.test_streams import Connection, freed, run

URL = '/v1/chat/interactive'
ASK = {'prompt': 'hello', 'session_id': 7, 'interactive_mode': True, 'request_output_len': 6, 'temperature': 0}


def test_a_session_goes_on_and_counts_its_history(serve):
    server = serve()
    first = server.post(URL, ASK).json()
    assert first.keys() == {'text', 'tokens', 'input_tokens', 'history_tokens', 'finish_reason'}
    assert first['history_tokens'] == 0 and first['tokens'] == 6 and first['finish_reason'] == 'length'
    second = server.post(URL, ASK | {'prompt': 'more'}).json()
    assert second['history_tokens'] == first['input_tokens'] + first['tokens'] and second['input_tokens'] > 0
    conversation = [{'role': 'user', 'content': 'hello'}, {'role': 'assistant', 'content': first['text']},
                    {'role': 'user', 'content': 'more'}]
    alone = server.post(URL, ASK | {'prompt': conversation, 'interactive_mode': False, 'session_id': -1}).json()
    assert alone['text'] == second['text'] and alone['history_tokens'] == 0


def test_a_session_ends(serve):
    server = serve()
    first = server.post(URL, ASK).json()
    ended = server.post(URL, {'prompt': '', 'session_id': 7, 'interactive_mode': False, 'request_output_len': 0})
    assert ended.json()['tokens'] == 0
    assert server.post(URL, ASK).json() == first


def test_the_stream_is_lines_of_json(serve):
    server = serve()
    whole = server.post(URL, ASK | {'session_id': -1}).json()
    response = server.post(URL, ASK | {'session_id': -1, 'stream': True})
    assert response.headers['content-type'].startswith('text/event-stream')
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert ''.join(line['text'] for line in lines) == whole['text']
    assert lines[-1] | {'text': ''} == whole | {'text': ''} and lines[0]['finish_reason'] is None


def test_sessions_belong_to_a_key(serve):
    server = serve(keys=KeyRing(['a', 'b']))
    a, b = {'x-api-key': 'a'}, {'x-api-key': 'b'}
    server.post(URL, ASK, headers=a)
    assert server.post(URL, ASK, headers=b).json()['history_tokens'] == 0
    server.post(URL, {'prompt': '', 'session_id': 7, 'request_output_len': 0}, headers=b)
    assert server.post(URL, ASK, headers=a).json()['history_tokens'] > 0


def test_memory_is_bounded(serve):
    server = serve(limits=Limits(sessions=2, session_bytes=100))
    for session in (1, 2, 3):
        server.post(URL, ASK | {'session_id': session, 'request_output_len': 1, 'prompt': 'x'})
    assert server.post(URL, ASK | {'session_id': 1, 'prompt': 'x' * 60}).json()['history_tokens'] == 0  # forgotten
    assert server.post(URL, ASK | {'session_id': 1, 'prompt': 'x'}).json()['history_tokens'] == 0  # was too large
    assert server.post(URL, ASK | {'session_id': 3, 'prompt': 'x'}).json()['history_tokens'] > 0


def test_one_request_of_a_session_at_a_time_and_cancel_ends_it(serve):
    server = serve(step_seconds=0.005)
    long = ASK | {'request_output_len': 200, 'ignore_eos': True, 'stream': True}

    async def main():
        running = Connection(server, long, URL)
        await asyncio.sleep(0.2)
        busy = Connection(server, ASK, URL)
        await busy.task
        assert busy.sent[0]['status'] == 409
        cancel = Connection(server, {'session_id': 7, 'cancel': True}, URL)
        await cancel.task
        await asyncio.wait_for(running.task, 2)
        assert json.loads(running.text.splitlines()[-1])['finish_reason'] == 'abort' and running.ended
        await freed(server)

    run(main())
    shape(server.post(URL, {'cancel': True}), 400, 'invalid_request')


def test_refusals(serve):
    server = serve()
    shape(server.post(URL, ASK | {'image_url': 'http://x'}), 400, 'unsupported_feature')
    shape(server.post(URL, ASK | {'adapter_name': 'x'}), 400, 'unsupported_feature')
    shape(server.post(URL, ASK | {'prompt': []}), 400, 'invalid_request')
    shape(server.post(URL, ASK | {'prompt': 'x' * 1000}), 400, 'context_length_exceeded')
