"""What a request passes before its route: headers, Host, CORS, keys, paths, methods, bodies, JSON."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from lmdeploy.errors import EngineDead, LmdeployError, RequestError
from lmdeploy.serve.auth import Access, KeyRing, read_keys
from lmdeploy.serve.errors import FAULTS, HttpError, failure
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.middleware import Cors, parse_json
from tests.serve.fake_server import CHAT

OPEN = {'/', '/ui/{name}', '/health', '/ready'}  # the page holds nothing: what it asks wants a key
KEYS = {'keys': KeyRing(['token', '密钥'], ['boss'])}


def shape(response: httpx.Response, status: int, code: str, *, request_id: bool = True) -> dict:
    """The body of an error, after checking both of its shapes."""
    assert response.status_code == status, response.text
    assert len(response.content) < 16 << 10
    body = response.json()
    assert body['error']['code'] == code
    assert (body['message'], body['type'], body['object']) == (body['error']['message'], body['error']['type'], 'error')
    assert body['code'] == status and body['param'] == body['error']['param']
    assert bool(response.headers.get('x-request-id')) is request_id
    return body


AUTHORIZATIONS = [
    {}, {'authorization': 'Bearer wrong'}, {'authorization': 'Bearer toke'}, {'authorization': 'Bearer token2'},
    {'authorization': 'Basic token'}, {'authorization': 'token'}, {'authorization': 'Bearer'},
    {'authorization': 'Bearer\ttoken'}, {'authorization': b'Bearer \xff\xfe'},
    {'authorization': 'Bearer ' + 'k' * 60000},
    {'x-api-key': 'wrong'}, {'x-api-key': ''}, {'x-original-url': '/health'},
]


def test_every_route_but_health_and_ready_wants_a_key(serve):
    server = serve(limits=Limits(bad_keys_per_minute=0), **KEYS)
    assert {route.path for route in server.app.table if route.access is Access.OPEN} <= OPEN
    for route in server.app.table:
        if route.access is Access.OPEN:
            continue
        bodies = set()
        for headers in AUTHORIZATIONS:
            response = server.ask(route.method, route.path, headers={'x-request-id': 'id'} | headers)
            if route.failure is failure:
                body = shape(response, 401, 'invalid_api_key')
                assert body['detail']['error'] == body['error']
            assert response.status_code == 401 and response.headers['www-authenticate'] == 'Bearer'
            bodies.add(response.content)
        assert len(bodies) == 1  # nothing tells why


def test_wrong_keys_are_slowed_down_by_address_and_good_ones_never(serve):
    server = serve(limits=Limits(bad_keys_per_minute=3), **KEYS)
    wrong, right = {'x-api-key': 'wrong'}, {'x-api-key': 'token'}
    for _ in range(3):
        shape(server.ask('GET', '/v1/models', headers=wrong), 401, 'invalid_api_key')
    for path in ('/v1/models', '/nothing'):
        refused = server.ask('GET', path, headers=wrong)
        shape(refused, 429, 'too_many_wrong_keys')
        assert 1 <= int(refused.headers['retry-after']) <= 20
    shape(server.ask('GET', '/v1/models'), 401, 'invalid_api_key')  # no key is no wrong key
    assert server.ask('GET', '/v1/models', headers=right).status_code == 200
    assert server.ask('GET', '/v1/models', headers=wrong | {'authorization': 'Bearer token'}).status_code == 200


@pytest.mark.parametrize('path', ['//v1/models', '/v1/models/', '/V1/models', '/v1/%6dodelsx',
                                  '/nothing', '/docs/x', '/%2e%2e/etc/passwd'])
def test_paths_are_exact_and_unknown_ones_are_told_to_key_holders_only(serve, path):
    server = serve(**KEYS)
    shape(server.ask('GET', path), 401, 'invalid_api_key')
    shape(server.ask('GET', path, headers={'authorization': 'Bearer token'}), 404, 'not_found')


@pytest.mark.parametrize('headers', [
    {'authorization': 'Bearer token'}, {'authorization': 'bearer token'}, {'authorization': 'BEARER   token '},
    {'x-api-key': 'token'}, {'x-api-key': 'boss'}, {'authorization': 'Bearer nonsense', 'x-api-key': 'token'},
    {'authorization': 'Bearer 密钥'.encode()},
])
def test_either_header_opens(serve, headers):
    assert serve(**KEYS).ask('GET', '/v1/models', headers=headers).status_code == 200


def test_a_repeated_key_header_opens_nothing():
    ring = KeyRing(['token'])
    with pytest.raises(HttpError):
        ring.authenticate([(b'authorization', b'Bearer token'), (b'authorization', b'Bearer x')], Access.USER)


def test_admin_routes_need_an_admin_key_or_a_server_that_opens_them():
    user, boss = [(b'x-api-key', b'token')], [(b'x-api-key', b'boss')]
    for ring in (KEYS['keys'], KeyRing(['token'], ['boss'], enable_admin=True), KeyRing(['token'])):
        with pytest.raises(HttpError, match='LMD-505'):
            ring.authenticate(user, Access.ADMIN)
    assert KEYS['keys'].authenticate(boss, Access.ADMIN).admin
    with pytest.raises(HttpError, match='LMD-505'):
        KeyRing().authenticate([], Access.ADMIN)
    assert not KeyRing(enable_admin=True).authenticate([], Access.ADMIN).keyed


def test_keys_are_kept_as_digests_and_callers_do_not_tell_them():
    ring = KeyRing(['token', 'other'])
    callers = [ring.authenticate([(b'x-api-key', key)], Access.USER) for key in (b'token', b'other')]
    assert callers[0].id != callers[1].id and callers[0].salt != callers[1].salt
    assert 'token' not in repr(ring) + repr(callers) + repr(vars(ring))


def test_key_files(tmp_path):
    path = tmp_path / 'keys'
    path.write_text('# ours\n token \n\nother\n')
    assert read_keys(path, '--api-keys-file') == ['token', 'other']
    for text in ('', '# nothing\n'):
        path.write_text(text)
        with pytest.raises(LmdeployError, match='LMD-528'):
            read_keys(path, '--api-keys-file')
    with pytest.raises(LmdeployError, match='LMD-528'):
        read_keys(tmp_path / 'none', '--api-keys-file')
    with pytest.raises(LmdeployError, match='LMD-527'):
        KeyRing([' token'])


def test_header_limits(serve):
    server = serve(limits=Limits(header_count=20, header_bytes=2000))
    assert server.ask('GET', '/v1/models').status_code == 200
    shape(server.ask('GET', '/v1/models', headers={f'x-{i}': 'a' for i in range(20)}), 431, 'headers_too_large')
    shape(server.ask('GET', '/v1/models', headers={'x': 'a' * 2000}), 431, 'headers_too_large')


@pytest.mark.parametrize(('host', 'status'), [
    ('127.0.0.1:23333', 200), ('localhost', 200), ('LOCALHOST:1', 200), ('a.localhost', 200), ('[::1]:80', 200),
    ('0.0.0.0:23333', 200), ('127.9.9.9', 200), ('evil.com', 403), ('127.0.0.1.evil.com', 403), ('8.8.8.8', 403),
    ('localhost.evil.com', 403), ('[::2]', 403), ('', 403), ('evil.com:127.0.0.1', 403)])
def test_on_a_loopback_address_the_host_header_is_one_too(serve, host, status):
    server = serve(check_host=True)
    response = server.ask('GET', '/v1/models', headers={'host': host})
    assert response.status_code == status
    assert serve().ask('GET', '/v1/models', headers={'host': host}).status_code == 200


def test_cors_headers_only_for_configured_origins(serve):
    page, other = {'origin': 'http://a.b'}, {'origin': 'http://c.d'}
    plain = serve()
    assert not [k for k in plain.ask('GET', '/v1/models', headers=page).headers if k.startswith('access-')]
    shape(plain.ask('OPTIONS', '/v1/models', headers=page | {'access-control-request-method': 'GET'}), 405,
          'method_not_allowed')
    one = serve(cors=Cors(('http://a.b',), credentials=True), **KEYS)
    asked = one.ask('OPTIONS', '/v1/models', headers=page | {'access-control-request-method': 'POST',
                                                             'access-control-request-headers': 'authorization'})
    assert asked.status_code == 204  # without a key: browsers ask without
    assert asked.headers['access-control-allow-origin'] == 'http://a.b'
    assert asked.headers['access-control-allow-headers'] == 'authorization'
    refused = one.ask('GET', '/v1/models', headers=page)
    assert refused.status_code == 401 and refused.headers['access-control-allow-credentials'] == 'true'
    assert 'access-control-allow-origin' not in one.ask('GET', '/v1/models', headers=other).headers
    star = serve(cors=Cors(('*',), credentials=True)).ask('GET', '/v1/models', headers=page).headers
    assert star['access-control-allow-origin'] == '*' and 'access-control-allow-credentials' not in star


def test_request_ids_are_echoed_or_made(serve):
    server = serve()
    good = 'abc-1.2:3_4'
    assert server.ask('GET', '/v1/models', headers={'x-request-id': good}).headers['x-request-id'] == good
    for bad in ('a b', 'a' * 129, 'ä', 'a\tb'):
        made = server.ask('GET', '/v1/models', headers={'x-request-id': bad.encode()}).headers['x-request-id']
        assert made != bad and len(made) == 32
    assert server.ask('GET', '/', headers={'x-request-id': good}).headers['request-id'] == good


def test_methods_and_media_types(serve):
    server = serve()
    shape(server.ask('GET', '/v1/chat/completions'), 405, 'method_not_allowed')
    shape(server.ask('DELETE', '/v1/models'), 405, 'method_not_allowed')
    assert server.ask('HEAD', '/v1/models').content == b''
    for kind in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data', '', 'application/jsonx'):
        shape(server.ask('POST', '/v1/chat/completions', content=json.dumps(CHAT), headers={'content-type': kind}), 415,
              'unsupported_media_type')
    for kind in ('application/json', 'Application/JSON; charset=utf-8', 'application/ld+json'):
        assert server.ask('POST', '/v1/chat/completions', content=json.dumps(CHAT),
                          headers={'content-type': kind}).status_code == 200


def test_bodies_are_capped_announced_or_not(serve):
    server = serve(limits=Limits(body_bytes=1000))
    big = json.dumps(CHAT | {'pad': 'x' * 1000}).encode()

    async def pieces():
        for i in range(0, len(big), 100):
            yield big[i:i + 100]

    kind = {'content-type': 'application/json'}
    shape(server.ask('POST', '/v1/chat/completions', content=big, headers=kind), 413, 'body_too_large')
    shape(server.ask('POST', '/v1/chat/completions', content=pieces(), headers=kind), 413, 'body_too_large')
    assert server.post('/v1/chat/completions', CHAT).status_code == 200


def test_a_body_that_does_not_come_is_given_up(serve):
    server = serve(limits=Limits(body_idle_seconds=1))

    async def pieces():
        yield b'{"model"'
        await asyncio.sleep(5)
        yield b':1}'

    response = server.ask('POST', '/v1/chat/completions', content=pieces(),
                          headers={'content-type': 'application/json'})
    shape(response, 408, 'body_timeout')


BAD_JSON = [
    b'', b'{', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":' + b'9' * 6000 + b'}',
    b'{"a":18446744073709551616}', b'{"a":-9223372036854775809}', b'"\\ud800"', b'"\\udc00"', b'["\\ud800\\n\\udc00"]',
    b'"\xff"', b'"\xed\xa0\x80"', b'\xef\xbb\xbf{}', b'[' * 65 + b']' * 65, b'[' * 100000, b'{"a":' * 100000, b'{}{}',
    b"{'a':1}", b'{"a":01}', b'\x00', b'nul',
]


@pytest.mark.parametrize('body', BAD_JSON, ids=range(len(BAD_JSON)))
def test_what_is_no_plain_json_is_refused(serve, body):
    with pytest.raises(HttpError, match='LMD-511'):
        parse_json(body, Limits())
    response = serve().ask('POST', '/v1/chat/completions', content=body, headers={'content-type': 'application/json'})
    shape(response, 400, 'invalid_json')


def test_json_at_its_limits_is_read():
    assert parse_json(b'[' * 64 + b']' * 64, Limits())
    assert parse_json(b'[18446744073709551615, -9223372036854775808]', Limits()) == [2**64 - 1, -2**63]
    assert parse_json(b'"\\ud83d\\ude00 \\\\ud800"', Limits()) == '😀 \\ud800'


def test_what_an_exception_says_stays_in_the_log(serve, caplog):
    for error in (ValueError('secret /etc/path'), EngineDead('LMD-338', cause='secret'),
                  RequestError('LMD-337', cause='secret')):
        told = failure(error, 'id1')
        assert told.status in (500, 503) and b'secret' not in told.body
    assert b'id1' in failure(ValueError(), 'id1').body


def test_the_table_of_faults_is_closed():
    from lmdeploy.texts import table

    assert set(FAULTS) <= set(table())
    assert all(400 <= fault.status < 600 and fault.code.isidentifier() for fault in FAULTS.values())
    assert failure(HttpError('LMD-515', waiting=1, most=1, retry_after=7.4), '').headers == ((b'retry-after', b'7'),)


def test_websockets_are_refused(serve):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(serve().app({'type': 'websocket', 'path': '/v1/chat/completions', 'headers': []}, None, send))
    assert sent == [{'type': 'websocket.close', 'code': 1008}]
