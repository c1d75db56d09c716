"""Streams of messages and responses that are ended early: by their client, or by a request."""

from __future__ import annotations

import pytest

from tests.serve.fake_server import MODEL, named_events
from tests.serve.test_streams import Connection, freed, run

LONG = {'model': MODEL, 'stream': True}
ASKS = {'/v1/messages': LONG | {'max_tokens': 200, 'messages': [{'role': 'user', 'content': 'hello'}]},
        '/v1/responses': LONG | {'max_output_tokens': 200, 'input': 'hello'}}


@pytest.mark.parametrize('path', ASKS)
def test_a_client_that_leaves_ends_its_request(serve, path):
    server = serve(step_seconds=0.005)

    async def main():
        connection = Connection(server, ASKS[path], path)
        await connection.until(6)
        connection.left.set()
        await connection.task
        await freed(server)
        assert not connection.ended

    run(main())
    metrics = server.context.metrics
    assert (metrics.accepted, metrics.cancelled) == (1, 1) and server.client.stats().output_tokens < 200


@pytest.mark.parametrize('path', ASKS)
def test_a_request_that_is_aborted_ends_with_what_there_is(serve, path):
    server = serve(step_seconds=0.005)

    async def main():
        connection = Connection(server, ASKS[path], path)
        await connection.until(6)
        async with server.http() as http:
            assert (await http.post('/abort_request', json={'abort_all': True})).status_code == 200
        await connection.task
        assert connection.ended
        *_, before, last = named_events(connection.text)
        if path == '/v1/messages':
            assert last == {'type': 'message_stop'} and before['delta']['stop_reason'] == 'abort'
            assert 0 < before['usage']['output_tokens'] < 200
        else:
            assert last['type'] == 'response.incomplete' and last['response']['status'] == 'cancelled'
            assert last['response']['output'][0]['status'] == 'incomplete'

    run(main())
