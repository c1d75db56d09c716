"""Pictures in requests: the same answer by every route and form; nothing is reached or read that must not be."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network

import anthropic
import openai
import pytest

from lmdeploy.chat import resolve_template
from lmdeploy.config.vision import read_vision
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor
from lmdeploy.engine.plan import PictureRoom
from lmdeploy.executor.base import Capacity
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.frontend.pictures import Pictures
from lmdeploy.serve.context import LoadedEngine, ServerContext
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.media import MediaRules, only_loaded, read_below
from lmdeploy.serve.openai.api_server import create_app
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.vl.load import encode_image_base64
from tests.serve.fake_server import MODEL, Server
from tests.serve.live import live
from tests.toy import SPECIALS, write_tokenizer
from tests.toy_vision import IMAGE_SPECIALS, TILE_TOKENS, TOWER, picture
from tests.vl.test_load import bomb

CHAT = '/v1/chat/completions'
LOOPBACK = MediaRules(networks=(ip_network('127.0.0.1/32'),))


@pytest.fixture(scope='module')
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    (folder / 'config.json').write_text('{}')
    SPECIALS.extend(IMAGE_SPECIALS)
    try:
        write_tokenizer(folder)
    finally:
        del SPECIALS[-len(IMAGE_SPECIALS):]
    return folder


@pytest.fixture
def serve(tokenizer_folder):
    """``serve(**fields of ServerContext)``: a server of a fake device that reads pictures."""
    started = []

    def make(**fields):
        tokenizer = Tokenizer(str(tokenizer_folder))
        capacity = Capacity(256, 16, 8, 512, 1000, tokenizer.vocab_size, pictures=PictureRoom(2000, 100, 200))
        executor = FakeExecutor(capacity)
        client = ThreadClient(lambda: EngineCore(executor, executor.start()))
        config = read_vision({
            'architectures': ['InternVLChatModel'], 'vision_config': TOWER, 'dynamic_image_size': True,
            'max_dynamic_patch': 12, 'use_thumbnail': True, 'ps_version': 'v2',
            'llm_config': {'architectures': ['Qwen2ForCausalLM'], 'hidden_size': 64}})
        frontend = AsyncFrontend(client, tokenizer, resolve_template(str(tokenizer_folder), tokenizer), capacity, 1000,
                                 pictures=Pictures(config, tokenizer, capacity.vocab_size, only_loaded))
        context = ServerContext(**{'model_names': (MODEL,), 'engine': LoadedEngine(frontend), **fields})
        server = Server(context, create_app(context), frontend, client, executor)
        started.append(server)
        return server

    yield make
    for server in started:
        server.client.close()
        server.context.media.close()
        server.context.metrics.check()


@pytest.fixture(scope='module')
def site():
    """A server on loopback with ``/tiger.png``; its requests are counted."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen += 1
            if self.path == '/away':
                self.send_response(302)
                self.send_header('Location', 'http://127.0.0.2/x')
                self.end_headers()
                return
            self.send_response(200 if self.path == '/tiger.png' else 404)
            self.end_headers()
            self.wfile.write(stored(picture(278, 182)))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.seen = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    yield server
    server.shutdown()
    server.server_close()


def stored(image):
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def data_url(image):
    return f'data:image/png;base64,{encode_image_base64(image)}'


def ask(*urls, text='what is it?', **options):
    shown = [{'type': 'image_url', 'image_url': {'url': url, **options}} for url in urls]
    return {'model': MODEL, 'temperature': 0, 'max_tokens': 12,
            'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': text}, *shown]}]}


def answer(server, body):
    found = server.post(CHAT, body)
    assert found.status_code == 200, found.text
    return found.json()['choices'][0]['message']['content'], found.json()['usage']['prompt_tokens']


def refused(server, url, code):
    found = server.post(CHAT, ask(url))
    assert found.status_code == 400 and found.json()['error']['code'] == code, found.text
    assert not re.search(r'0x[0-9a-f]{6,}|/etc|Errno|refused', found.text)
    return found.text


def test_urls_and_data_give_the_same_answer(serve, site):
    server = serve(media_rules=LOOPBACK)
    by_url, tokens = answer(server, ask(f'{site.url}/tiger.png'))
    by_data = answer(server, ask(data_url(picture(278, 182))))
    assert (by_url, tokens) == by_data == answer(server, ask(encode_image_base64(picture(278, 182))))
    other = answer(server, ask(data_url(picture(278, 182, 5))))
    assert other[0] != by_url and other[1] == tokens
    single = answer(server, ask(data_url(picture(278, 182)), max_dynamic_patch=1))
    assert tokens - single[1] == 6 * TILE_TOKENS
    low = answer(server, ask(data_url(picture(900, 900)), detail='low'))
    assert low[1] < answer(server, ask(data_url(picture(900, 900)), detail='high'))[1]


def test_openai_client(serve, site):
    server = serve(media_rules=LOOPBACK)
    with live(server) as running:
        api = openai.OpenAI(api_key='x', base_url=f'{running.url}/v1', timeout=20, max_retries=0)
        both = [api.chat.completions.create(**ask(url)).choices[0].message.content
                for url in (f'{site.url}/tiger.png', data_url(picture(278, 182)))]
        assert both[0] == both[1]
        stream = api.chat.completions.create(**ask(data_url(picture(278, 182))), stream=True)
        assert ''.join(chunk.choices[0].delta.content or '' for chunk in stream) == both[0]
        response = api.responses.create(model=MODEL, temperature=0, max_output_tokens=12, input=[{
            'role': 'user', 'content': [{'type': 'input_text', 'text': 'what is it?'},
                                        {'type': 'input_image', 'detail': 'auto',
                                         'image_url': data_url(picture(278, 182))}]}])
        assert response.output_text == both[0]


def test_anthropic_client(serve, site):
    server = serve(media_rules=LOOPBACK)
    wanted, tokens = answer(server, ask(data_url(picture(278, 182))))
    sources = [{'type': 'base64', 'media_type': 'image/png', 'data': encode_image_base64(picture(278, 182))},
               {'type': 'url', 'url': f'{site.url}/tiger.png'}]
    with live(server) as running:
        api = anthropic.Anthropic(api_key='x', base_url=running.url, timeout=20, max_retries=0)
        for source in sources:
            messages = [{'role': 'user', 'content': [{'type': 'image', 'source': source},
                                                     {'type': 'text', 'text': 'what is it?'}]}]
            found = api.messages.create(model=MODEL, max_tokens=12, messages=messages)
            assert found.content[0].text == wanted and found.usage.input_tokens == tokens
            assert api.messages.count_tokens(model=MODEL, messages=messages).input_tokens == tokens


def test_texts_go_on_as_before(serve):
    server = serve()
    body = ask() | {'messages': [{'role': 'user', 'content': 'hello'}]}
    assert answer(server, body) == answer(server, body | {'messages': [{'role': 'user', 'content': [
        {'type': 'text', 'text': 'hello'}]}]})


def test_a_prompt_can_be_counted_with_its_pictures(serve):
    server = serve()
    body = ask(data_url(picture(278, 182)))
    found = server.post('/tokenize', {'model': MODEL, 'messages': body['messages']})
    assert found.json()['count'] == answer(server, body)[1]


LOCAL = ['file:///etc/passwd', '/etc/passwd', 'file://localhost/etc/passwd', 'FILE:///etc/passwd',
         '..%2f..%2fetc/passwd', 'file:///dev/zero', '/proc/self/environ', 'ftp://example.com/x', 'x', '',
         'C:\\x.png', 'tiger.png', '\\\\host\\x',
         'gopher://x', 'javascript:x', './tiger.png', '~/x.png', 'file:tiger.png']


def test_no_file_is_opened_and_no_private_address_reached(serve, site, monkeypatch):
    server, opened, before = serve(), [], site.seen
    answer(server, ask(data_url(picture())))  # what is imported late has been
    watched = {'on': True}

    def hook(event, args):
        if watched['on'] and event == 'open' and isinstance(args[0], (str, bytes)):
            opened.append(os.fsdecode(args[0]))

    sys.addaudithook(hook)
    for url in LOCAL:
        begin = time.monotonic()
        refused(server, url, 'image_url_not_allowed')
        assert time.monotonic() - begin < 1
    for url in (f'{site.url}/tiger.png', 'http://localhost/x', 'http://[::1]/', 'http://169.254.169.254/latest',
                'http://2130706433/', f'http://user@127.0.0.1:{site.server_port}/tiger.png'):
        refused(server, url, 'image_not_fetched')
    watched['on'] = False
    assert site.seen == before
    assert not [path for path in opened if 'passwd' in path or 'environ' in path or 'zero' in path or 'tiger' in path]


def test_the_operator_narrows_and_widens(serve, site):
    without = serve(media_rules=MediaRules(urls=False))
    assert 'data:' in refused(without, f'{site.url}/tiger.png', 'image_url_not_allowed')
    named = serve(media_rules=MediaRules(domains=('example.com',), networks=LOOPBACK.networks))
    refused(named, f'{site.url}/tiger.png', 'image_not_fetched')
    open_ = serve(media_rules=LOOPBACK)
    refused(open_, f'{site.url}/away', 'image_not_fetched')
    refused(open_, f'{site.url}/none', 'image_not_fetched')


def test_files_below_the_allowed_folder_alone(serve, tmp_path):
    folder, outside = tmp_path / 'media', tmp_path / 'secret.png'
    (folder / 'deep').mkdir(parents=True)
    (folder / 'deep' / 'a b.png').write_bytes(stored(picture(278, 182)))
    outside.write_bytes(stored(picture()))
    (folder / 'link.png').symlink_to(outside)
    (folder / 'door').symlink_to(tmp_path)
    os.mkfifo(folder / 'pipe')
    server = serve(media_rules=MediaRules(folder=folder))
    wanted = answer(server, ask(data_url(picture(278, 182))))
    assert answer(server, ask((folder / 'deep' / 'a b.png').as_uri())) == wanted
    for url in (outside.as_uri(), f'file://{folder}/../secret.png', f'file://{folder}/%2e%2e/secret.png',
                f'file://{folder}/link.png', f'file://{folder}/door/secret.png', f'file://{folder}/pipe',
                f'file://{folder}', f'file://{folder}/', f'file://{folder}/none.png', 'file:///etc/passwd',
                f'file://host{folder}/deep/a%20b.png', f'file://{folder}/deep%2f..%2f..%2fsecret.png',
                f'file://{folder}/deep/a%20b.png?x'):
        begin = time.monotonic()
        refused(server, url, 'image_url_not_allowed')
        assert time.monotonic() - begin < 1
    with pytest.raises(OSError):
        read_below(folder, (folder / 'deep' / 'a b.png').as_uri(), 10)


def test_bombs_and_damage_are_refused_with_one_text(serve):
    server = serve(limits=Limits(image_pixels=1_000_000, images_pixels=1_200_000, images=3))
    told = set()
    for data in (bomb(12_000, 12_000), bomb(65_000, 65_000), b'', b'x' * 100, stored(picture())[:-90],
                 stored(picture(1001, 1000))):
        begin = time.monotonic()
        text = refused(server, f'data:image/png;base64,{base64.b64encode(data).decode()}', 'invalid_image')
        told.add(text.partition('LMD-683')[2].partition('"')[0])
        assert time.monotonic() - begin < 1
    refused(server, 'data:image/png;base64,%%%%', 'invalid_image')
    refused(server, 'data:image/png', 'invalid_image')
    assert len(told) == 1
    for body in (ask(*[data_url(picture(900, 900))] * 2), ask(*[data_url(picture())] * 4)):
        found = server.post(CHAT, body)
        assert found.status_code == 400 and 'limit' in found.text


def test_bytes_of_pictures_and_the_time_to_fetch_one(serve):
    small = data_url(picture())
    size = len(stored(picture()))
    assert serve(limits=Limits(image_bytes=size, images_bytes=size)).post(CHAT, ask(small)).status_code == 200
    for limits, urls in ((Limits(image_bytes=size - 1), [small]),
                         (Limits(images_bytes=2 * size - 1), [small, data_url(picture(100, 80))])):
        found = serve(limits=limits).post(CHAT, ask(*urls))
        assert found.status_code == 400, found.text

    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b'x')
                    self.wfile.flush()
                    time.sleep(0.1)

        def log_message(self, *args):
            pass

    slow = ThreadingHTTPServer(('127.0.0.1', 0), Dripping)
    slow.daemon_threads = True
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    server = serve(media_rules=LOOPBACK, limits=Limits(fetch_seconds=1))
    begin = time.monotonic()
    found = server.post(CHAT, ask(f'http://127.0.0.1:{slow.server_port}/x.png'))
    assert found.status_code == 400 and time.monotonic() - begin < 4, found.text
    slow.shutdown()
    slow.server_close()


def test_a_slow_picture_holds_up_nobody(serve, tokenizer_folder):
    """While one request waits for its picture, others are answered."""
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(1.5)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    slow = ThreadingHTTPServer(('127.0.0.1', 0), Slow)
    slow.daemon_threads = True
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    server = serve(media_rules=LOOPBACK)
    with live(server) as running:
        api = openai.AsyncOpenAI(api_key='x', base_url=f'{running.url}/v1', timeout=20, max_retries=0)

        async def both():
            waiting = asyncio.ensure_future(api.chat.completions.create(
                **ask(f'http://127.0.0.1:{slow.server_port}/x.png')))
            await asyncio.sleep(0.2)
            begin = time.monotonic()
            await api.chat.completions.create(**ask(data_url(picture())))
            taken = time.monotonic() - begin
            with pytest.raises(openai.BadRequestError):
                await waiting
            return taken

        assert asyncio.run(both()) < 1
    slow.shutdown()
    slow.server_close()
