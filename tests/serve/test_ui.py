"""The chat page: its files and headers, and what a reader does with it in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
import time

import httpx
import pytest

from lmdeploy.serve.app import App
from lmdeploy.serve.auth import Access, KeyRing
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Request, Stream
from lmdeploy.serve.openai.api_server import add_operations, add_page
from lmdeploy.serve.openai.models import Models
from lmdeploy.serve.openai.protocol import ChatRequest
from lmdeploy.serve.page import FOLDER, TYPES
from lmdeploy.serve.routes import Routes
from lmdeploy.serve.sse import DONE, error_event, event
from tests.serve.chromium import EXECUTABLE, Page, browse
from tests.serve.fake_server import MODEL
from tests.serve.live import live
from tests.serve.test_edge import shape
from tests.serve.test_tutorial import api_server
from tests.toy import write_model

browser_there = pytest.mark.skipif(EXECUTABLE is None, reason='no Chromium on this machine')
IDLE = '!document.querySelector(".busy")'
NASTY = ('<img src=x onerror="document.title=1"><script>document.title=2</script> **bold** `<b>`\n\n'
         '```html\n<i>x</i>\n```')


# ---- the files ------------------------------------------------------------------------------------------------------

def names() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir() if path.suffix in TYPES)


def test_the_page_is_open_and_its_policy_lets_nothing_else_run(serve):
    server = serve(keys=KeyRing(['token']))
    for path in ('/', *(f'/ui/{name}' for name in names())):
        answer = server.ask('GET', path)
        assert answer.status_code == 200 and answer.content == (FOLDER / (path[4:] or 'index.html')).read_bytes()
        policy = dict(part.strip().split(' ', 1) for part in answer.headers['content-security-policy'].split(';'))
        assert policy['default-src'] == policy['frame-ancestors'] == policy['form-action'] == "'none'"
        assert {policy[f'{kind}-src'] for kind in ('script', 'style', 'img', 'connect')} == {"'self'"}
        assert policy['require-trusted-types-for'] == "'script'" and 'unsafe' not in str(policy)
        assert answer.headers['x-content-type-options'] == 'nosniff'
        assert answer.headers['referrer-policy'] == 'no-referrer'
    assert server.ask('GET', '/').headers['content-type'] == 'text/html; charset=utf-8'
    assert server.ask('GET', '/ui/chat.js').headers['content-type'] == 'text/javascript; charset=utf-8'
    assert server.ask('HEAD', '/').content == b''
    shape(server.ask('GET', '/v1/models'), 401, 'invalid_api_key')


@pytest.mark.parametrize('name', ['nothing.js', '..%2fpage.py', '%2e%2e/page.py', 'chat.js/', 'CHAT.JS'])
def test_there_are_no_other_files(serve, name):
    assert serve().ask('GET', f'/ui/{name}').status_code in (401, 404)


def test_without_the_page_its_paths_do_not_exist(serve):
    server = serve(page=False)
    for path in ('/', '/ui/chat.js'):
        shape(server.ask('GET', path), 404, 'not_found')


def test_the_files_need_no_other_machine_and_make_no_html_of_texts():
    index = (FOLDER / 'index.html').read_text('utf-8')
    assert re.findall(r'(?:src|href)="(?!#)([^"]+)"', index)
    for target in re.findall(r'(?:src|href)="(?!#)([^"]+)"', index):
        assert (FOLDER / target.removeprefix('ui/')).is_file(), target
    assert not re.search(r'<style|\sstyle=|\son\w+=|<script(?! type="module" src="ui/chat.js"></script>)', index)
    for name in names():
        text = (FOLDER / name).read_text('utf-8')
        assert not re.findall(r'https?://(?!www\.w3\.org/2000/svg)', text), name
        assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(', text), name
    for target in re.findall(r"from '\./([^']+)'", ''.join(p.read_text('utf-8') for p in FOLDER.glob('*.js'))):
        assert (FOLDER / target).is_file()


# ---- in a browser ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with browse(tmp_path_factory.mktemp('chromium')) as page:
        yield page


@pytest.fixture
def page(browser: Page):
    """The tab, with nothing remembered of earlier pages."""
    browser.size(1280, 800)
    browser.problems.clear()
    browser.requested.clear()
    yield browser
    browser.open('about:blank')
    assert browser.problems == []


def visit(page: Page, url: str) -> None:
    page.send('Storage.clearDataForOrigin', origin=url, storageTypes='all')
    page.open(f'{url}/ui/icon.svg')
    page.js('sessionStorage.clear()')
    page.open(f'{url}/')


def ask(page: Page, text: str) -> None:
    page.click('#question')
    page.type(text)
    page.key('Enter')


def last(page: Page) -> str:
    """The text of the last answer."""
    return page.js('[...document.querySelectorAll(".answer .text")].pop().innerText')


@browser_there
def test_a_conversation_with_a_server_that_wants_a_key(page, tmp_path):
    toy = str(write_model(tmp_path / 'toy'))
    with api_server(toy, tmp_path, '--api-keys', 'token', '--model-name', "it's", key='token') as server:
        url = f'http://127.0.0.1:{server.port}'
        visit(page, url)
        page.wait('document.querySelector("#key-dialog").open')
        page.type('wrong')
        page.key('Enter')
        page.wait('document.querySelector("#key-problem").textContent')
        page.type('token')
        page.key('Enter')
        page.wait('document.querySelector("#model").value === "it\'s"')
        assert page.text('#state') == 'Ready'

        page.click('#show-settings')
        page.click('#max_tokens')
        page.type('12')
        page.click('#seed')
        page.type('3')
        page.click('#system')
        page.type('a "system"\nin two lines')
        ask(page, '你好 "you" it\'s')
        page.wait(f'document.querySelectorAll(".answer").length === 1 && {IDLE}')
        figures = page.text('.answer .figures')
        assert re.search(r'\d tokens/s', figures) and re.search(r'first token \d+\.\d\d s', figures)
        count = int(re.search(r'(\d+) tokens$|(\d+) tokens\n', figures).group(0).split()[0])
        assert 1 < count <= 12

        page.hover('.answer .t')
        rows = page.js('[...document.querySelectorAll("#tip div")].map((row) => row.innerText)')
        shares = [float(re.search(r'([\d.]+) %', row).group(1)) for row in rows]
        assert 5 <= len(shares) <= 6 and shares[:5] == sorted(shares[:5], reverse=True) and sum(shares) < 101
        page.click('#question')  # leaves the answer

        first = last(page)
        for kind, selector in (('curl', '#code-dialog label:first-child'), ('python', '#code-dialog label:last-child')):
            page.click('#show-code')
            page.click(selector)
            code = page.js('document.querySelector("#code").textContent')
            assert 'YOUR_API_KEY' in code and 'token"' not in code
            page.key('Escape')
            code = code.replace('YOUR_API_KEY', 'token')
            if kind == 'python':
                out = subprocess.run([sys.executable, '-X', 'utf8', '-c', code], capture_output=True, encoding='utf-8',
                                     timeout=120)
                assert out.returncode == 0, out.stderr
                said = out.stdout
            else:
                command = shlex.split(code)
                assert command[:3] == ['curl', '-N', f'{url}/v1/chat/completions']
                headers = dict(value.split(': ') for flag, value in zip(command, command[1:]) if flag == '-H')
                told = httpx.post(command[2], headers=headers, content=command[-1].encode(), timeout=60).text
                chunks = [json.loads(line[6:]) for line in told.splitlines() if line[:7] == 'data: {']
                said = ''.join(chunk['choices'][0]['delta'].get('content') or '' for chunk in chunks)
            assert said.split() == first.split()  # the same seed, the same answer

        ask(page, 'more')
        page.wait(f'document.querySelectorAll(".answer").length === 2 && {IDLE}')
        page.click('#show-code')
        sent = page.js('document.querySelector("#code").textContent')
        assert [m['role'] for m in _sent(page)['messages']] == ['system', 'user', 'assistant', 'user'], sent
        page.key('Escape')

        page.open(f'{url}/')  # as it was before
        page.wait('document.querySelector("#model").value')
        assert page.js('document.querySelectorAll(".user, .answer").length') == 4
        kept = page.js('[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie]')
        assert 'token\\"' not in kept[0] and 'token' in kept[1] and kept[2] == ''
        assert all(address.startswith(url) for address in page.requested)


@browser_there
def test_who_gives_no_key_is_asked_again_with_the_next_question(page, serve):
    with live(serve(keys=KeyRing(['token']), step_seconds=0.001)) as running:
        visit(page, running.url)
        page.wait('document.querySelector("#key-dialog").open')
        page.key('Escape')
        ask(page, 'hello')
        page.wait('document.querySelector("#key-dialog").open')
        page.click('#key-cancel')
        page.wait('document.querySelector(".answer .error")')
        assert page.text('.error b') == 'The server wants an API key'
        page.click('.error button')
        page.wait('document.querySelector("#key-dialog").open')
        page.type('token')
        page.key('Enter')
        page.wait(f'document.querySelector(".answer .figures").textContent && {IDLE}')
        assert last(page).strip() and page.js('document.querySelector("#model").value') == MODEL
        page.open('about:blank')


def _sent(page: Page) -> dict:
    """The request that the page would send, read from the command that it shows."""
    page.click('#code-dialog label:first-child')
    return json.loads(shlex.split(page.js('document.querySelector("#code").textContent'))[-1])


class Scripted:
    """A server whose answers are written down: a list of pieces, each a delta or an error."""

    def __init__(self, server) -> None:
        self.pieces: list[object] = []
        self.asked: list[ChatRequest] = []
        routes = Routes()
        add_page(routes)
        add_operations(routes, server.context)
        routes.add('GET', '/v1/models', Models(server.context).all, Access.USER, 'models')
        routes.add('POST', '/v1/chat/completions', self.answer, Access.USER, 'answers')
        server.app = App(server.context, routes, docs=False)

    async def answer(self, body: ChatRequest, request: Request) -> Stream:
        self.asked.append(body)
        return Stream(self._chunks(list(self.pieces)), lambda error: error_event(error, request.id))

    async def _chunks(self, pieces):
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            if piece is None:  # ends without saying so
                return
            text = piece.get('content', piece.get('reasoning_content', ''))
            entries = [{'token': c, 'bytes': [b], 'logprob': -0.5, 'top_logprobs': [{'token': c, 'logprob': -0.5}]}
                       for b, c in ((b, chr(b)) for b in text.encode())]
            await asyncio.sleep(0.01)
            yield event({'choices': [{'index': 0, 'delta': piece, 'logprobs': {'content': entries}}]})
        yield event({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'length'}]})
        yield DONE


@pytest.fixture
def scripted(serve, page):
    server = serve()
    script = Scripted(server)
    with live(server) as running:
        visit(page, running.url)
        page.wait('document.querySelector("#model").value')
        yield script
        page.open('about:blank')


@browser_there
def test_texts_stay_texts(page, scripted):
    scripted.pieces = [{'content': NASTY[i:i + 7]} for i in range(0, len(NASTY), 7)]
    page.click('#show-settings')
    page.click('#system')
    page.type(NASTY)
    ask(page, NASTY.replace('\n', ' '))
    page.wait(f'document.querySelectorAll(".answer").length === 1 && {IDLE}')
    assert page.js('document.querySelectorAll("#messages :is(img, script, i, b)").length') == 0
    assert page.js('document.title') == 'lmdeploy'
    assert '<img src=x onerror="document.title=1"><script>document.title=2</script> bold <b>' in last(page)
    assert page.text('.answer pre') == '<i>x</i>' and page.text('.answer .title span') == 'html'
    assert page.text('.answer strong') == 'bold' and page.text('.answer p code') == '<b>'
    page.hover('.answer .t')
    assert '<' in page.text('#tip') and page.js('document.querySelectorAll("#tip img").length') == 0
    assert scripted.asked[0].messages[0].content == NASTY and scripted.asked[0].top_logprobs == 5
    assert 'ended at the token limit' in page.text('.figures')


@browser_there
def test_reasoning_is_folded_and_is_not_sent_back(page, scripted):
    scripted.pieces = [{'role': 'assistant', 'content': ''}, {'reasoning_content': 'hm <b>'}, {'content': 'yes, 你'},
                       {'content': '好'}]
    ask(page, 'why?')
    page.wait(f'document.querySelectorAll(".answer").length === 1 && {IDLE}')
    assert page.js('document.querySelector("details.thought").open') is False
    assert re.fullmatch(r'Thought for \d+\.\d s', page.text('.thought summary'))
    page.click('.thought summary')
    assert page.text('.thought div') == 'hm <b>' and last(page) == 'yes, 你好'
    assert page.js('[...document.querySelectorAll(".t")].map((node) => node.textContent).join("")') == 'yes, 你好'
    ask(page, 'again')
    page.wait(f'document.querySelectorAll(".answer").length === 2 && {IDLE}')
    assert [m.content for m in scripted.asked[1].messages] == ['why?', 'yes, 你好', 'again']
    assert all(m.reasoning_content is None for m in scripted.asked[1].messages)
    scripted.pieces = [HttpError('LMD-518', retry_after=5)]
    ask(page, 'now?')
    page.wait('document.querySelector(".answer .error")')
    page.open(page.js('location.href'))
    page.wait('document.querySelector("#model").value')
    assert page.text('.thought summary') == 'Thoughts' and last(page) == 'yes, 你好'
    assert page.js('document.querySelectorAll(".user, .answer").length') == 5  # all but the answer that failed


@browser_there
@pytest.mark.parametrize('pieces, title', [
    ([HttpError('LMD-518', retry_after=5)], 'The model is still loading'),
    ([HttpError('LMD-516', most=1, what='requests', retry_after=2)], 'Too many requests; wait a moment'),
    ([HttpError('LMD-512', param='seed', reason='<b>no</b>')], 'The server did not accept the request'),
    ([{'content': 'half'}, HttpError('LMD-521', request_id='1')], 'The request failed'),
    ([{'content': 'half'}, None], 'The connection broke before the answer was complete'),
])
def test_errors_are_told_in_words_and_can_be_tried_again(page, scripted, pieces, title):
    scripted.pieces = pieces
    ask(page, 'hello')
    page.wait('document.querySelector(".answer .error")')
    assert page.text('.error b') == title
    assert page.js('document.querySelectorAll(".error :is(p b, script)").length') == 0
    scripted.pieces = [{'content': 'better'}]
    page.click('.error button')
    page.wait(f'!document.querySelector(".error") && {IDLE}')
    assert last(page) == 'better' and page.js('document.querySelectorAll(".user, .answer").length') == 2


@browser_there
def test_a_server_that_is_gone_is_told_in_words(page, serve):
    with live(serve()) as running:
        visit(page, running.url)
        page.wait('document.querySelector("#model").value')
    ask(page, 'hello')
    page.wait('document.querySelector(".answer .error")')
    assert page.text('.error b') == 'The server cannot be reached'
    page.problems.clear()  # the browser logs it as well


@browser_there
def test_stop_ends_the_request_and_keeps_what_there_is(page, serve):
    server = serve(step_seconds=0.05)
    with live(server) as running:
        visit(page, running.url)
        page.wait('document.querySelector("#model").value')
        ask(page, 'tell me a long story')
        page.wait('document.querySelector(".answer .text").textContent.length > 5')
        assert server.client.stats().in_flight == 1
        page.click('#stop')
        page.wait(IDLE)
        assert server.settled()
        assert 'stopped' in page.text('.figures') and last(page).strip()
        assert page.js('document.activeElement.id') == 'question'
        page.click('.user .small')  # edit
        assert page.js('document.querySelector("#question").value') == 'tell me a long story'
        assert page.js('document.querySelectorAll(".user, .answer").length') == 0


@browser_there
def test_by_keyboard_alone(page, scripted):
    scripted.pieces = [{'content': 'some words'}]
    assert page.js('document.activeElement.id') == 'question'
    page.type('hello')
    page.key('Enter')
    page.wait(f'document.querySelectorAll(".answer").length === 1 && {IDLE}')
    page.js('document.querySelector(".answer .text").focus()')
    page.key('ArrowRight')
    page.key('ArrowRight')
    assert page.text('.t.at') == 'o' and page.js('document.querySelector("#tip").hidden') is False
    page.key('ArrowLeft')
    assert page.text('.t.at') == 's'
    page.key('Escape')
    assert page.js('document.querySelector("#tip").hidden') is True
    reached = []
    for _ in range(40):
        page.key('Tab')
        reached.append(page.js('document.activeElement.id || document.activeElement.className'))
    assert {'model', 'new', 'show-code', 'language', 'theme', 'show-settings', 'question', 'small'} <= set(reached)


@browser_there
@pytest.mark.parametrize('language, tag, shown', [('zh-CN', 'zh-CN', '有什么可以帮你？'),
                                                  ('de-DE', 'en', 'How can I help?')])
def test_it_speaks_the_browsers_language_and_everything_has_a_name(page, scripted, language, tag, shown):
    agent = page.js('navigator.userAgent')
    page.send('Emulation.setUserAgentOverride', userAgent=agent, acceptLanguage=language)
    page.open(page.js('location.href'))
    page.wait(f'document.documentElement.lang === "{tag}" && document.querySelector("#model").value')
    assert page.text('#welcome h1') == shown
    page.click('#show-settings')
    controls = [node for node in page.send('Accessibility.getFullAXTree')['nodes'] if node['role']['value'] in (
        'button', 'textbox', 'combobox', 'slider', 'spinbutton', 'checkbox', 'radio', 'navigation', 'complementary')]
    assert len(controls) > 15
    assert all(node['name']['value'] for node in controls if not node['ignored']), controls
    page.click('#language')
    assert page.text('#welcome h1') != shown
    page.send('Emulation.setUserAgentOverride', userAgent=agent, acceptLanguage='en')


@browser_there
def test_both_languages_have_the_same_texts(page, scripted):
    keys = page.js("""import('/ui/page.js').then(({TEXTS}) => Object.values(TEXTS).map((texts) =>
        Object.entries(texts).map(([key, value]) => [key, typeof value === 'object' ? Object.keys(value) : 0])))""")
    assert keys[0] == keys[1] and len(keys) == 2
    used = page.js('[...document.querySelectorAll("[data-t], [data-label], [data-placeholder]")].map((node) => '
                   'node.dataset.t ?? node.dataset.label ?? node.dataset.placeholder)')
    assert set(used) <= {key for key, _ in keys[0]} and len(used) > 30


@browser_there
def test_it_fits_a_phone_and_has_dark_colours(page, scripted):
    page.size(360, 640, mobile=True)
    scripted.pieces = [{'content': 'word ' * 40 + '\n\n```\n' + 'x' * 300 + '\n```\n' + 'y' * 300}]
    ask(page, 'z' * 300)
    page.click('#send')  # on a phone, Enter is a new line
    page.wait(f'document.querySelectorAll(".answer").length === 1 && {IDLE}')
    width = 'Math.max(document.documentElement.scrollWidth, document.querySelector("#scroller").scrollWidth)'
    assert page.js(width) <= 360
    page.click('#show-settings')
    box = page.js('(({left, right}) => [left, right])(document.querySelector("#settings").getBoundingClientRect())')
    assert 0 <= box[0] < box[1] <= 360
    light = page.js('getComputedStyle(document.body).backgroundColor')
    page.send('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': 'dark'}])
    page.wait('document.documentElement.hasAttribute("data-dark")')
    assert page.js('getComputedStyle(document.body).backgroundColor') != light
    page.send('Emulation.setEmulatedMedia', features=[])


@browser_there
def test_a_long_answer_costs_each_frame_the_same(page, scripted):
    text = 'All of this is one sentence of a paragraph. ' * 4 + '\n\n'
    scripted.pieces = [{'content': text} for _ in range(60)]
    begun = time.monotonic()
    ask(page, 'much')
    page.wait(f'document.querySelectorAll(".answer").length === 1 && {IDLE}')
    assert page.js('document.querySelectorAll(".answer .t").length') > 10000
    assert time.monotonic() - begun < 30
