"""APIClient over TCP: against the server, and against peers that send what no server should."""

from __future__ import annotations

import inspect
import pickle
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from lmdeploy.errors import ConfigError, LmdeployError
from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.fetch import Address
from lmdeploy.serve.openai.api_client import (
    APIClient,
    ServerConnectionError,
    ServerError,
    get_model_list,
    get_streaming_response,
    input_prompt,
    json_loads,
)
from tests.serve.fake_server import MODEL
from tests.serve.live import live

MESSAGES = [{'role': 'user', 'content': '你好'}]


@pytest.fixture
def served(serve):
    server = serve()
    with live(server) as running:
        yield server, APIClient(running.url)


@contextmanager
def peer(*pieces: bytes):
    """A server that reads one request and answers with these pieces, one send each, then closes."""
    listener = socket.create_server(('127.0.0.1', 0))
    got = []

    def answer():
        try:
            connection, _ = listener.accept()
        except OSError:  # nobody came
            return
        with connection:
            request = connection.recv(65536)
            if b'POST' in request:
                while not request.endswith(b'}'):
                    request += connection.recv(65536)
            got.append(request)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                connection.sendall(piece)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{listener.getsockname()[1]}', got
    finally:
        listener.close()
        thread.join(5)


def chunked(*pieces: bytes, end: bool = True) -> list[bytes]:
    head = b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n'
    return [head, *(b'%x\r\n%s\r\n' % (len(piece), piece) for piece in pieces), *([b'0\r\n\r\n'] if end else [])]


# -- against the server ----------------------------------------------------------------------------------------------


def test_one_answer_and_a_stream_are_alike(served):
    server, client = served
    ask = {'model': client.available_models[0], 'messages': MESSAGES, 'max_tokens': 12, 'temperature': 0.0}
    [whole] = client.chat_completions_v1(**ask)
    assert whole['object'] == 'chat.completion', whole
    assert whole['usage']['completion_tokens'] == 12
    chunks = list(client.chat_completions_v1(**ask, stream=True, stream_options={'include_usage': True}))
    assert all(isinstance(chunk, dict) and chunk['object'] == 'chat.completion.chunk' for chunk in chunks)
    text = ''.join(choice['delta'].get('content') or '' for chunk in chunks for choice in chunk['choices'])
    assert text == whole['choices'][0]['message']['content']
    assert chunks[-1]['usage'] == whole['usage'] and chunks[-1]['choices'] == []
    assert server.settled()


def test_further_fields_reach_the_request(served):
    _, client = served
    [answer] = client.chat_completions_v1(MODEL, MESSAGES, max_completion_tokens=3, return_token_ids=True)
    assert answer['prompt_token_ids'] and answer['usage']['completion_tokens'] == 3
    [error] = client.chat_completions_v1(MODEL, MESSAGES, seed='x')
    assert error['param'] == 'seed'


def test_completions(served):
    _, client = served
    [whole] = client.completions_v1(MODEL, 'the quick', max_tokens=6, temperature=0.0)
    assert whole['object'] == 'text_completion'
    chunks = list(client.completions_v1(MODEL, 'the quick', max_tokens=6, temperature=0.0, stream=True))
    assert ''.join(chunk['choices'][0]['text'] for chunk in chunks if chunk['choices']) == whole['choices'][0]['text']
    [several] = client.completions_v1(MODEL, ['one', 'two'], max_tokens=2)
    assert [choice['index'] for choice in several['choices']] == [0, 1]


def test_encode(served):
    server, client = served
    ids, length = client.encode('the quick brown fox')
    assert ids == server.frontend.tokenizer.encode('the quick brown fox') and length == len(ids)
    ids, lengths = client.encode(['a', '你好,世界'])
    assert [len(one) for one in ids] == lengths
    assert client.encode('a', do_preprocess=True)[1] > client.encode('a')[1]
    with pytest.raises(ServerError) as caught:
        client.encode(7)
    assert caught.value.code == 'LMD-512' and 'input' in str(caught.value)


def test_sessions(served):
    _, client = served
    ask = {'session_id': 5, 'request_output_len': 6, 'temperature': 0.0}
    [first] = client.chat('hello', **ask)
    pieces = list(client.chat('more', **ask, stream=True))
    assert first[1:] == (6, 'length') and pieces[-1][1:] == (6, 'length')
    [again] = client.chat_interactive_v1('more', interactive_mode=True, **ask)
    assert again['history_tokens'] > 0
    client.end_session(5)
    [anew] = client.chat_interactive_v1('hello', interactive_mode=True, **ask)
    assert anew['history_tokens'] == 0 and anew['text'] == first[0]
    with pytest.raises(ValueError, match='session_id'):
        client.chat('hello', -1)
    with pytest.raises(ServerError, match='top_p'):
        list(client.chat('hello', 5, top_p=7.0))


def test_a_stream_of_a_session_is_cancelled(serve):
    server = serve(step_seconds=0.005)
    with live(server) as running:
        client = APIClient(running.url)
        pieces = client.chat('hello', 5, request_output_len=200, stream=True, ignore_eos=True)
        next(pieces)
        client.cancel_session(5)
        *_, last = pieces
        assert last[2] == 'abort' and last[1] < 200
    assert server.settled()


def test_errors_are_yielded_in_both_shapes(served):
    _, client = served
    for stream in (False, True):
        [error] = client.chat_completions_v1('nobody', MESSAGES, stream=stream)
        assert error['object'] == 'error' and error['code'] == 404 and 'nobody' in error['message']
        assert error['error']['code'] == 'model_not_found'
    [error] = client.completions_v1(MODEL, 'x', top_p=2.0)
    assert error['code'] == 400 and error['param'] == 'top_p'


def test_an_error_after_the_first_byte_is_the_last_item(serve):
    server = serve(fail_at=5)
    with live(server) as running:
        *chunks, last = APIClient(running.url).chat_completions_v1(MODEL, MESSAGES, stream=True, max_tokens=50)
    assert chunks and 'error' in last and 'error' not in chunks[0]


def test_keys(serve, caplog, monkeypatch):
    import lmdeploy.serve.openai.api_client as module

    monkeypatch.setattr(module.get_logger(), 'propagate', True)
    with live(serve(keys=KeyRing(['token', '密钥']))) as running:
        for key in ('token', '密钥'):
            client = APIClient(running.url, key)
            assert client.available_models == [MODEL]
            [answer] = client.chat_completions_v1(MODEL, MESSAGES, max_tokens=1)
            assert answer['object'] == 'chat.completion'
        for key in (None, 'wrong', ''):
            client = APIClient(running.url, key)
            assert client.available_models is None
            assert 'valid api key' in caplog.text and 'token' not in caplog.text
            [error] = client.chat_completions_v1(MODEL, MESSAGES)
            assert error['code'] == 401 and error['error']['code'] == 'invalid_api_key'
        assert get_model_list(f'{running.url}/v1/models', {'Authorization': 'Bearer token'}) == [MODEL]
        assert get_model_list(f'{running.url}/v1/models') is None


def test_the_models_are_asked_for_once(serve):
    with live(serve()) as running:
        client = APIClient(running.url)
        assert client.available_models == [MODEL]
    assert client.available_models == [MODEL]  # the server is gone
    with pytest.raises(ConnectionError):
        assert APIClient(running.url).available_models


@pytest.mark.parametrize('host', ['0.0.0.0', 'localhost', '127.0.0.1'])
def test_addresses(serve, host):
    with live(serve(check_host=True)) as running:
        for url in (f'http://{host}:{running.port}', f'http://{host}:{running.port}/', f'{host}:{running.port}'):
            assert APIClient(url).available_models == [MODEL]


def test_leaving_a_stream_ends_the_request(serve):
    server = serve(step_seconds=0.005)
    with live(server) as running:
        stream = APIClient(running.url).chat_completions_v1(MODEL, MESSAGES, stream=True, max_tokens=200,
                                                            ignore_eos=True)
        next(stream)
        stream.close()
        assert server.settled()


def test_the_functions_of_lmdeploy(served, monkeypatch):
    _, client = served
    pieces = list(get_streaming_response('hello', f'{client.api_server_url}/v1/chat/interactive', 3, 4))
    assert pieces[-1][1:] == (4, 'length') and all(isinstance(piece[0], str) for piece in pieces)
    with pytest.raises(ServerError):
        list(get_streaming_response('hello', f'{client.api_server_url}/v1/chat/interactive', -1, cancel=True))
    assert json_loads('{"a": 1}') == {'a': 1} and json_loads('{') == ''
    lines = iter(['one', 'two', '', 'three'])
    monkeypatch.setattr('builtins.input', lambda *_: next(lines))
    assert input_prompt() == 'one\ntwo'


def test_the_signature_is_that_of_lmdeploy():
    def names(method):
        return list(inspect.signature(method).parameters)

    assert names(APIClient)[:2] == ['api_server_url', 'api_key']
    assert names(APIClient.chat_completions_v1)[1:9] == [
        'model', 'messages', 'temperature', 'top_p', 'logprobs', 'top_logprobs', 'n', 'max_tokens']
    assert names(APIClient.chat_interactive_v1)[1:8] == [
        'prompt', 'image_url', 'session_id', 'interactive_mode', 'stream', 'stop', 'request_output_len']
    assert names(APIClient.chat)[1:6] == ['prompt', 'session_id', 'image_url', 'request_output_len', 'stream']
    assert names(APIClient.encode)[1:] == ['input', 'do_preprocess', 'add_bos']


# -- against others ----------------------------------------------------------------------------------------------


def items(url: str) -> list[dict]:
    return list(APIClient(url, timeout=5).chat_completions_v1('m', MESSAGES, stream=True))


def test_text_is_whole_wherever_the_network_cuts_it():
    text = 'data: {"t": "你好,世界 \U0001f600"}\n\n: comment\n\nevent: x\ndata:{"u": 1}\r\n\r\ndata: [DONE]\n\n'
    body = text.encode()
    with peer(*chunked(*(body[i:i + 1] for i in range(len(body))))) as (url, got):
        assert items(url) == [{'t': '你好,世界 \U0001f600'}, {'u': 1}]
    assert '你好'.encode() in got[0] and b'\\u' not in got[0]


@pytest.mark.parametrize('pieces', [
    chunked(b'data: {"a": 1}\n\n', end=False),
    chunked(b'data: {"a": 1}\n\ndata: {"b"', end=False),
    chunked(b'data: {"a": 1}\n\n'),  # ends well, but without its mark
], ids=['between', 'within', 'no mark'])
def test_a_stream_that_breaks_off_is_no_answer(pieces):
    with peer(*pieces) as (url, _):
        found = []
        with pytest.raises(ServerConnectionError) as caught:
            for item in APIClient(url).chat_completions_v1('m', MESSAGES, stream=True):
                found.append(item)
    assert found == [{'a': 1}] and caught.value.code == 'LMD-582'


@pytest.mark.parametrize('raw', [
    b'', b'nonsense\r\n\r\n', b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"a"',
    b'HTTP/1.1 200 OK\r\n\r\n<html>', b'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]',
    b''.join(chunked(b'data: nonsense\n\n')), b''.join(chunked(b'data: [1]\n\n'))])
def test_what_is_no_answer_is_an_error_with_a_code(raw):
    with peer(raw) as (url, _), pytest.raises(ServerConnectionError) as caught:
        items(url)
    assert caught.value.code in ('LMD-582', 'LMD-583') and url in str(caught.value)
    assert isinstance(caught.value, ConnectionError) and isinstance(caught.value, LmdeployError)
    assert '连接' in caught.value.text('zh') or '应答' in caught.value.text('zh')


def test_an_error_page_of_a_gateway_is_yielded_as_an_error():
    page = b'<html>502 Bad Gateway</html>'
    with peer(b'HTTP/1.1 502 Bad Gateway\r\ncontent-length: %d\r\n\r\n%s' % (len(page), page)) as (url, _):
        [error] = items(url)
    assert error['code'] == 502 and '502 Bad Gateway' in error['message'] and error['error']['code'] == '502'
    assert ServerError(error).code == 'HTTP 502'


def test_silence_ends():
    with socket.create_server(('127.0.0.1', 0)) as silent:
        client = APIClient(f'http://127.0.0.1:{silent.getsockname()[1]}', timeout=0.3)
        with pytest.raises(ServerConnectionError, match='imed'):
            client.available_models  # noqa: B018


def test_a_key_adds_no_header():
    with peer(b'') as (url, got), pytest.raises(ValueError):
        list(APIClient(url, 'a\r\nx-evil: 1').chat_completions_v1('m', MESSAGES))
    assert not any(got)


def test_nobody_there():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerConnectionError) as caught:
        items(f'http://0.0.0.0:{port}')
    assert caught.value.code == 'LMD-580' and f'http://127.0.0.1:{port}' in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize('url', ['', 'ftp://x', 'http://', 'http://x:99999', 'http://x:y', 'http://x?a=1', 'http://u@x',
                                 'http://[::1'])
def test_what_is_no_address(url):
    with pytest.raises(ConfigError) as caught:
        APIClient(url)
    assert caught.value.code == 'LMD-581'


def test_addresses_are_read():
    assert Address.parse('http://[::]:8000/v/') == Address('http', '::1', 8000, '/v')
    assert Address.parse('http://[::1]:8000').url == 'http://[::1]:8000'
    assert Address.parse('https://example.org') == Address('https', 'example.org', 443)
    assert Address.parse('example.org:80').url == 'http://example.org:80'


def test_a_server_error_keeps_what_the_server_said():
    error = ServerError({'error': {'message': 'no', 'lmdeploy_code': 'LMD-514', 'param': 'model'}, 'code': 404})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code, again.text('zh'), again.params) == ('LMD-514: no', 'LMD-514', 'no',
                                                                        {'param': 'model'})


def test_the_client_needs_the_standard_library_only():
    code = 'import sys, lmdeploy.serve.openai.api_client\nprint(*{name.partition(".")[0] for name in sys.modules})'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    third = {'pydantic', 'msgspec', 'uvicorn', 'httpx', 'requests', 'torch', 'numpy', 'tokenizers', 'yaml'}
    assert not third & set(out.stdout.split())
