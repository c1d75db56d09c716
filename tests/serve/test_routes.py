"""The smaller routes: tokens, /generate, embeddings, health, metrics, abort, the documentation."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct

import pytest

from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.context import HealthReport
from tests.serve.fake_server import CHAT, MODEL, SESSION, events
from tests.serve.test_chat import expected, prepared
from tests.serve.test_edge import shape
from tests.serve.test_streams import LONG, URL, Connection, freed, run


def test_models_are_listed_under_all_their_names(serve):
    body = serve(model_names=('a', 'b'), created=5).ask('GET', '/v1/models').json()
    assert body['object'] == 'list' and [card['id'] for card in body['data']] == ['a', 'b']
    card = body['data'][0]
    assert (card['object'], card['owned_by'], card['root'], card['parent'], card['created']) == (
        'model', 'lmdeploy', 'a', None, 5)
    assert card['permission'][0]['id'].startswith('modelperm-') and card['max_model_len'] == SESSION


def test_a_model_is_found_by_its_name_whatever_is_in_it(serve):
    server = serve(model_names=('a', 'org/b', '/models/c'))
    for name in ('a', 'org/b', 'org%2Fb', '/models/c'):
        card = server.ask('GET', f'/v1/models/{name}').json()
        assert card['object'] == 'model' and card['id'] == name.replace('%2F', '/')
    shape(server.ask('GET', '/v1/models/other'), 404, 'model_not_found')


def test_encode(serve):
    server = serve()
    tokenizer, template = server.frontend.tokenizer, server.frontend.template
    ids = tokenizer.encode('hello')
    assert server.post('/v1/encode', {'input': 'hello'}).json() == {'input_ids': ids, 'length': len(ids)}
    many = server.post('/v1/encode', {'input': ['hello', '']}).json()
    assert many == {'input_ids': [ids, []], 'length': [len(ids), 0]}
    chat = server.post('/v1/encode', {'input': 'hello', 'do_preprocess': True}).json()['input_ids']
    assert chat == tokenizer.encode_segments(template.render_prompt('hello'), add_bos=template.add_bos)
    shape(server.post('/v1/encode', {'input': 'x' * 10**6}), 400, 'invalid_request')
    shape(server.post('/v1/encode', {'input': 'x', 'model': 'y'}), 404, 'model_not_found')


def test_tokenize_and_back(serve):
    server = serve()
    body = server.post('/tokenize', {'prompt': 'hello'}).json()
    assert body == {'count': len(body['tokens']), 'max_model_len': SESSION, 'tokens': body['tokens']}
    assert server.post('/detokenize', {'tokens': body['tokens']}).json() == {'prompt': 'hello'}
    chat = server.post('/tokenize', {'messages': CHAT['messages']}).json()['tokens']
    assert chat == prepared(server, CHAT['messages'])
    assert '<|im_start|>user' in server.post('/detokenize', {'tokens': chat}).json()['prompt']
    hidden = server.post('/detokenize', {'tokens': chat, 'skip_special_tokens': True}).json()['prompt']
    assert '<|im_start|>' not in hidden
    for bad in ({}, {'prompt': 'a', 'messages': CHAT['messages']}, {'messages': []}):
        shape(server.post('/tokenize', bad), 400, 'invalid_request')
    for bad in ([303], [-1], ['a'], [2**40]):
        shape(server.post('/detokenize', {'tokens': bad}), 400, 'invalid_request')


def test_generate(serve):
    server = serve()
    tokens, reason = expected(server, [5, 6], 12)
    ask = {'input_ids': [5, 6], 'max_tokens': 12}
    body = server.post('/generate', ask).json()
    assert body['output_ids'] == tokens and body['meta_info']['finish_reason'] == {'type': reason}
    assert (body['meta_info']['prompt_tokens'], body['meta_info']['completion_tokens']) == (2, len(tokens))
    *pieces, done = events(server.post('/generate', ask | {'stream': True}).text)
    assert done == '[DONE]' and sum((p['output_ids'] for p in pieces), []) == tokens
    assert ''.join(p['text'] for p in pieces) == body['text']
    for bad in ({'prompt': 'a', 'input_ids': [1]}, {}, {'prompt': 'a', 'top_logprobs_num': 1}):
        shape(server.post('/generate', bad), 400, 'invalid_request')


def test_embeddings_have_unit_length_in_either_encoding(serve):
    server = serve()
    ask = {'model': MODEL, 'input': ['hello', 'a b']}
    body = server.post('/v1/embeddings', ask).json()
    assert [entry['index'] for entry in body['data']] == [0, 1]
    for entry in body['data']:
        assert sum(x * x for x in entry['embedding']) == pytest.approx(1)
    coded = server.post('/v1/embeddings', ask | {'encoding_format': 'base64'}).json()['data'][0]['embedding']
    raw = base64.b64decode(coded)
    assert list(struct.unpack(f'<{len(raw) // 4}f', raw)) == pytest.approx(body['data'][0]['embedding'])
    assert body['usage']['prompt_tokens'] == body['usage']['total_tokens'] > 0
    shape(server.post('/v1/embeddings', ask | {'dimensions': 10**6}), 400, 'invalid_request')
    shape(server.post('/v1/embeddings', ask | {'input': []}), 400, 'invalid_request')
    assert server.settled()


class Engine:
    """An engine in a state of our choice."""

    def __init__(self, state, frontend=None):
        self.state, self.frontend = state, frontend

    def health(self):
        return HealthReport(self.state, 'because')

    async def sleep(self):
        self.state = 'sleeping'

    async def wakeup(self):
        self.state = 'ready'


@pytest.mark.parametrize(('state', 'health', 'ready', 'chat', 'code'), [
    ('ready', 200, 200, 200, ''), ('loading', 503, 503, 503, 'model_loading'),
    ('restarting', 503, 503, 503, 'engine_unavailable'), ('failed', 503, 503, 503, 'engine_unavailable'),
    ('sleeping', 200, 503, 503, 'engine_unavailable')])
def test_health_and_readiness_in_every_state(serve, state, health, ready, chat, code):
    server = serve(keys=KeyRing(['a']))
    server.context.engine = Engine(state, None if state == 'loading' else server.frontend)
    told = server.ask('GET', '/health')
    assert told.status_code == health and told.json()['status'] in ('healthy', 'initializing', 'unhealthy', 'sleeping')
    assert (told.json()['message'] == '') is (state == 'ready')
    assert server.ask('GET', '/ready').status_code == ready
    answer = server.post(URL, CHAT, headers={'x-api-key': 'a'})
    assert answer.status_code == chat
    if code:
        assert int(shape(answer, 503, code) and answer.headers['retry-after']) > 0


def test_draining_turns_new_requests_away(serve):
    server = serve()
    server.context.draining = True
    assert server.ask('GET', '/ready').status_code == 503 and server.ask('GET', '/health').status_code == 200
    shape(server.post(URL, CHAT), 503, 'shutting_down')


def test_sleep_and_wakeup_are_for_admins(serve):
    server = serve(keys=KeyRing(['a'], ['boss']))
    server.context.engine = Engine('ready', server.frontend)
    for path in ('/sleep', '/wakeup'):
        shape(server.ask('POST', path, headers={'x-api-key': 'a'}), 403, 'admin_key_required')
        shape(server.ask('GET', path, headers={'x-api-key': 'boss'}), 405, 'method_not_allowed')
    for path in ('/sleep?level=3', '/sleep?depth=1', '/wakeup?tags=all'):
        assert server.ask('POST', path, headers={'x-api-key': 'boss'}).status_code == 400
    for path in ('/sleep?level=2', '/sleep'):  # the second time it sleeps already
        assert server.ask('POST', path, headers={'x-api-key': 'boss'}).json()['status'] == 'sleeping'
    assert server.ask('GET', '/is_sleeping', headers={'x-api-key': 'a'}).json() == {'is_sleeping': True}
    assert server.ask('POST', '/wakeup', headers={'x-api-key': 'boss'}).status_code == 200
    assert server.ask('GET', '/is_sleeping', headers={'x-api-key': 'a'}).json() == {'is_sleeping': False}
    shape(server.ask('POST', '/terminate', headers={'x-api-key': 'boss'}), 404, 'not_found')


def test_terminate_where_it_is_allowed(serve):
    asked = []
    server = serve(keys=KeyRing(['a'], ['boss']), terminate=lambda: asked.append(1))
    shape(server.ask('POST', '/terminate', headers={'x-api-key': 'a'}), 403, 'admin_key_required')
    assert server.ask('POST', '/terminate', headers={'x-api-key': 'boss'}).status_code == 200 and asked == [1]


def scrape(server, **options) -> dict[str, float]:
    """The metrics by name and labels, less those that all have."""
    text = server.ask('GET', '/metrics', **options).text
    found = {}
    for line in text.splitlines():
        if not line.startswith('#'):
            name, value = line.rsplit(' ', 1)
            name = re.sub(r'(model_name|engine)="[^"]*",?', '', name).replace(',}', '}').replace('{}', '')
            found[name] = float(value)
    return found


def test_metrics_have_lmdeploy_s_names_and_add_up(serve):
    server = serve()
    assert server.post(URL, CHAT).status_code == 200
    assert server.post(URL, CHAT | {'n': 2, 'stream': True}).status_code == 200
    shape(server.post(URL, CHAT | {'n': 0}), 400, 'invalid_request')
    found = scrape(server)
    p = 'lmdeploy:'
    assert found[f'{p}requests_accepted_total'] == 2 == sum(
        found[p + name] for name in ('requests_finished_total', 'requests_failed_total', 'requests_cancelled_total',
                                     'requests_in_flight'))
    assert found[f'{p}requests_rejected_total{{code="invalid_request"}}'] == 1
    assert found[f'{p}http_responses_total{{status="200"}}'] == 2
    assert found[f'{p}generation_tokens_total'] == 24
    for name in ('event_loop_lag_seconds', 'event_loop_lag_worst_seconds', 'num_requests_running',
                 'num_requests_waiting', 'num_requests_succeeded', 'num_requests_failed',
                 'num_api_requests_routed', 'num_api_requests_waiting', 'gpu_cache_usage_perc', 'prefix_cache_hit_rate',
                 'prompt_tokens_total', 'cached_tokens_total', 'request_success_total{finished_reason="length"}',
                 'iteration_tokens_total', 'request_prompt_tokens_count', 'request_generation_tokens_sum',
                 'time_to_first_token_seconds_count', 'time_per_output_token_seconds_bucket{le="+Inf"}',
                 'iter_token_latency_count', 'e2e_request_latency_seconds_count', 'request_queue_time_seconds_count',
                 'request_inference_time_seconds_count', 'request_prefill_time_seconds_count',
                 'request_decode_time_seconds_count', 'request_cached_tokens_count',
                 'request_cache_hit_ratio_count'):
        assert p + name in found, name
    assert found[f'{p}e2e_request_latency_seconds_count'] == 3


def test_metrics_add_up_in_the_middle_of_everything(serve):
    server = serve(step_seconds=0.002, max_batch_size=3)

    async def main():
        async with server.http() as http:
            connections = []
            for i in range(30):
                connections.append(Connection(server, LONG | {'stream': i % 2 == 0, 'max_tokens': 1 + i}))
                if i % 3 == 0:
                    connections[i // 2].left.set()
                text = (await http.get('/metrics')).text
                values = {name: float(value) for name, value in re.findall(
                    r'^lmdeploy:requests_(\w+?)(?:_total)?{[^}]*} ([0-9.e+]+)$', text, re.M)}
                assert values['accepted'] == sum(
                    values[name] for name in ('finished', 'failed', 'cancelled', 'in_flight'))
            await asyncio.gather(*(connection.task for connection in connections))
            await freed(server)

    run(main())


def test_public_metrics_need_no_key(serve):
    assert serve(keys=KeyRing(['a']), public_metrics=True).ask('GET', '/metrics').status_code == 200


def test_abort_reaches_one_s_own_requests_and_an_admin_s_all(serve):
    server = serve(step_seconds=0.005, keys=KeyRing(['a', 'b'], ['boss']))

    async def main():
        async with server.http() as http:
            async def abort(key, **body):
                return await http.post('/abort_request', json=body, headers={'x-api-key': key})

            async def ask(session):
                return await http.post(URL, json=LONG | {'session_id': session, 'n': 2},
                                       headers={'x-api-key': 'a', 'x-request-id': f'id{session}'})

            tasks = [asyncio.ensure_future(ask(i)) for i in range(3)]
            await asyncio.sleep(0.15)
            foreign, unknown = await abort('b', session_id=0), await abort('b', session_id=99)
            shape(foreign, 404, 'request_not_found')
            assert foreign.content == unknown.content
            assert (await abort('b', abort_all=True)).json() == {'aborted': 0}
            assert (await abort('a', session_id=0)).json() == {'aborted': 1}
            assert (await abort('a', request_id='id1')).json() == {'aborted': 1}
            assert (await abort('boss', abort_all=True)).json() == {'aborted': 1}
            for answer in await asyncio.gather(*tasks):
                assert [c['finish_reason'] for c in answer.json()['choices']] == ['abort', 'abort']
            shape(await abort('a'), 400, 'invalid_request')
            await freed(server)

    run(main())
    assert server.context.metrics.cancelled == 3


def test_the_documentation_describes_every_route(serve):
    server = serve(keys=KeyRing(['a']))
    key = {'x-api-key': 'a'}
    document = server.ask('GET', '/openapi.json', headers=key).json()
    assert {(m.upper(), p) for p, ops in document['paths'].items() for m in ops} == {
        (route.method, route.path.replace(':path', '')) for route in server.app.table}
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= document['components']['schemas'].keys()
    page = server.ask('GET', '/docs', headers=key)
    assert page.headers['content-type'].startswith('text/html') and '/v1/chat/completions' in page.text
    assert '<script' not in page.text and not re.search(r'(src|href)="(?!/)', page.text)
    shape(serve(docs=False).ask('GET', '/docs'), 404, 'not_found')
