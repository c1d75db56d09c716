"""The proxy's small parts: addresses, events, headers, what is read of a body, the table of nodes, the file."""

from __future__ import annotations

import asyncio
import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.errors import ConfigError
from lmdeploy.serve.auth import Access, KeyRing
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.proxy import nodes as table
from lmdeploy.serve.proxy.addresses import AllowedNodes, NodeAddress, parse
from lmdeploy.serve.proxy.asked import PREFIX_CHARS, read
from lmdeploy.serve.proxy.context import ProxyKeys
from lmdeploy.serve.proxy.events import MOST_HELD, EventCutter
from lmdeploy.serve.proxy.headers import HOP_BY_HOP, to_client, to_node
from lmdeploy.serve.proxy.membership import reachable_url
from lmdeploy.serve.proxy.nodes import Node, NodeTable
from lmdeploy.serve.proxy.state import StateFile


@pytest.mark.parametrize(('url', 'spelling'), [
    ('http://10.0.0.1:23333', 'http://10.0.0.1:23333'), ('http://10.0.0.1', 'http://10.0.0.1:80'),
    ('https://GPU-1.Example.:443/', 'https://gpu-1.example:443'), ('http://[::1]:80', 'http://[::1]:80'),
    ('http://[0:0::1]:8000/', 'http://[::1]:8000')])
def test_one_spelling_of_an_address(url, spelling):
    assert parse(url).url == spelling == parse(spelling).url


@pytest.mark.parametrize('url', [
    '', 'x', 'ftp://a', 'file:///etc/passwd', '//a', 'http://', 'http://u:p@a:1', 'http://u@a', 'http://@a',
    'http://a:0', 'http://a:99999', 'http://a:x', 'http://a/v1', 'http://a:1/..', 'http://a?x', 'http://a#x',
    'http://a\\@b', 'http://a b', 'http://a\r\nX: y', 'http://a\t', 'http://\u0430.example', 'http://[::1',
    'http://[::1%25eth0]', 'http://-a', 'http://a%2eb', 'http://a:1@169.254.169.254', 'gopher://a', 'unix:///run/x',
    'http://' + 'a' * 400])
def test_what_is_no_address_of_a_node(url):
    with pytest.raises(HttpError, match='LMD-561'):
        parse(url)


METADATA = ['169.254.169.254', '[::ffff:169.254.169.254]', '[fe80::1]', '[fd00:ec2::254]', '[fd20:ce::254]',
            '100.100.100.200', '168.63.129.16', '192.0.0.192', '0.0.0.0', '[::]', '224.0.0.1', '255.255.255.255',
            '[ff02::1]']


@pytest.mark.parametrize('host', METADATA)
@pytest.mark.parametrize('entries', [(), ('0.0.0.0/0', '::/0')])
def test_addresses_that_no_node_may_have(host, entries):
    with pytest.raises(HttpError, match='LMD-561'):
        asyncio.run(AllowedNodes(entries).resolve(f'http://{host}:80'))


@pytest.mark.parametrize(('entries', 'host', 'allowed'), [
    ((), '127.0.0.1', True), ((), '10.1.2.3', True), ((), '172.31.0.1', True), ((), '172.32.0.1', False),
    ((), '192.168.1.1', True), ((), '[::1]', True), ((), '[fd12::1]', True), ((), '8.8.8.8', False),
    ((), '[2001:4860:4860::8888]', False), ((), '[::ffff:8.8.8.8]', False), ((), '[::ffff:10.0.0.1]', True),
    (('10.1.0.0/16',), '10.1.9.9', True), (('10.1.0.0/16',), '10.2.0.1', False), (('10.1.0.0/16',), '127.0.0.1', False),
    (('8.8.8.8',), '8.8.8.8', True), (('localhost',), 'localhost', True), (('10.1.0.0/16',), 'localhost', False),
    ((), '2130706433', True), (('10.1.0.0/16',), '2130706433', False), ((), '134744072', False)])
def test_where_nodes_may_be(entries, host, allowed):
    """An address is judged by what it leads to, however it is written; and it is kept as that."""
    try:
        address = asyncio.run(AllowedNodes(entries).resolve(f'http://{host}:80'))
    except HttpError as error:
        assert error.code == 'LMD-561' and not allowed
    else:
        assert allowed and address.ip and address.pinned.startswith(('http://1', 'http://[', 'http://8'))


def test_every_address_of_a_name_must_be_allowed(monkeypatch):
    async def main():
        async def found(*args, **kwargs):
            return [(2, 1, 6, '', (ip, 80)) for ip in ('10.0.0.1', '169.254.169.254')]

        monkeypatch.setattr(asyncio.get_running_loop(), 'getaddrinfo', found)
        with pytest.raises(HttpError, match='LMD-561.*no node may be'):
            await AllowedNodes().resolve('http://two.example:80')

    asyncio.run(main())


@pytest.mark.parametrize('entry', ['10.0.0.0/33', '10.1.2.3/8', 'a/b', '', '300.1.1.1', 'http://a'])
def test_entries_that_allow_nothing(entry):
    with pytest.raises(ConfigError, match='LMD-527.*--allowed-nodes'):
        AllowedNodes([entry])


events = st.lists(st.sampled_from([b'data: x', b'', b'event: y', b': c', b'\xe4\xbd', b'id: 1']), max_size=12)


@given(events, st.sampled_from([b'\n', b'\r\n', b'\r']), st.data())
def test_events_are_cut_between_only(lines, end, data):
    """Nothing changes, nothing that is complete waits, nothing incomplete goes."""
    whole = b''.join(line + end for line in lines)
    cutter, sent, at = EventCutter(), b'', 0
    while at < len(whole):
        size = data.draw(st.integers(1, len(whole) - at))
        sent += cutter.push(whole[at:at + size])
        at += size
        arrived = whole[:at]
        assert arrived.startswith(sent) and (not sent or sent.endswith(end * 2))
        assert end * 2 not in arrived[len(sent):]
    assert sent + cutter.flush() == whole


def test_an_event_without_end_is_bounded():
    cutter = EventCutter()
    sent = b''.join(cutter.push(b'x' * 10000) for _ in range(100))
    assert len(sent) > 1_000_000 - MOST_HELD - 10000


names = st.sampled_from(sorted([*HOP_BY_HOP, b'x-a', b'authorization', b'cookie', b'content-type', b'x-api-key',
                                b'host', b'content-length', b'x-lmdeploy-caller', b'accept', b'forwarded',
                                b'set-cookie']))


@given(st.lists(st.tuples(names, st.sampled_from([b'1', b'x-a, accept', b'close']))))
def test_headers_that_pass(headers):
    sent = to_node(headers, authority='a:1', request_id='r', caller='c', key='k')
    assert [value for name, value in sent if name == b'authorization'] == [b'Bearer k']
    assert [value for name, value in sent if name == b'host'] == [b'a:1']
    assert {name for name, _ in sent} <= {b'authorization', b'host', b'x-request-id', b'accept-encoding',
                                          b'content-type', b'x-lmdeploy-caller', b'accept'}
    back = to_client(headers)
    assert not {name for name, _ in back} & (HOP_BY_HOP | {b'set-cookie'})
    listed = {part.strip() for name, value in headers if name == b'connection' for part in value.split(b',')}
    assert not {name for name, _ in back} & listed
    assert set(back) <= set(headers)


def chat(*messages: tuple[str, str], **more: object) -> dict:
    return {'model': 'm', 'messages': [{'role': role, 'content': text} for role, text in messages], **more}


texts = st.text(max_size=40)


@given(st.text(min_size=PREFIX_CHARS, max_size=PREFIX_CHARS + 10), texts, texts)
def test_requests_with_the_same_long_beginning_go_together(system, one, other):
    assert read(chat(('system', system), ('user', one)), 'c').affinity == read(
        chat(('system', system), ('user', other)), 'c').affinity
    assert read({'prompt': system + one}, 'c').affinity == read({'prompt': system + other}, 'c').affinity


@given(texts, texts, st.lists(st.tuples(st.sampled_from(['user', 'assistant']), texts), max_size=4))
def test_the_turns_of_a_conversation_go_together(system, question, rest):
    first = chat(('system', system), ('user', question))
    later = chat(('system', system), ('user', question), *rest)
    assert read(first, 'c').affinity == read(later, 'c').affinity


def test_what_parts_requests():
    body = chat(('system', 's'), ('user', 'u'))
    found = {read(body, 'c').affinity, read(body, 'd').affinity, read(body | {'model': 'n'}, 'c').affinity,
             read(body | {'tools': [{'type': 'function'}]}, 'c').affinity,
             read(chat(('system', 't'), ('user', 'u')), 'c').affinity,
             read(chat(('system', 's'), ('user', 'v')), 'c').affinity, read({'prompt': 's'}, 'c').affinity,
             read({'model': 'm', 'system': 'x', 'messages': body['messages']}, 'c').affinity,
             read({'input_ids': [1, 2, 3]}, 'c').affinity, read({'input_ids': [1, 2, 4]}, 'c').affinity}
    assert len(found) == 10 and b'' not in found
    parts = {'model': 'm', 'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'hello'}]}]}
    assert read(parts, 'c').affinity == read(chat(('user', 'hello')), 'c').affinity
    assert read({'model': 'm'}, 'c').affinity == read({'model': 'm', 'messages': []}, 'c').affinity == b''


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                               st.sampled_from(['role', 'content', 'text', 'x']), inner, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from(['model', 'messages', 'prompt', 'input', 'system', 'stream', 'tools']),
                       json_values))
def test_any_object_is_read_or_refused(body):
    try:
        facts = read(body, 'c')
    except HttpError as error:
        assert error.code == 'LMD-512' and not isinstance(body['model'], (str, type(None)))
    else:
        assert facts.stream == (body.get('stream') is True) and len(facts.affinity) in (0, 32)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def address(i: int) -> NodeAddress:
    return NodeAddress('http', f'10.0.0.{i}', 80, f'10.0.0.{i}')


def test_a_node_goes_down_after_failures_in_a_row_and_comes_back():
    clock = Clock()
    node = Node(address(1), ('m',), clock=clock)
    for _ in range(2):
        node.fail('x')
        node.fail('x')
        node.finished(1.0)
    assert node.up
    for _ in range(table.MOST_FAILURES):
        node.fail('why')
    assert not node.up and node.lost.is_set() and node.reason == 'why'
    assert node.probe_at == table.REST_SECONDS  # whatever its /health says until then
    node.answered()
    assert node.up and not node.lost.is_set() and node.failures == 0
    node.fail('nobody listens', certain=True)
    assert not node.up and node.probe_at == 0.0


def test_the_table():
    clock, changes, left = Clock(), [], []
    nodes = NodeTable(clock=clock, changed=lambda: changes.append(len(nodes)), left=left.append)
    with pytest.raises(HttpError, match='LMD-562'):
        nodes.serving('m')
    first = nodes.add(address(1), ('m', 'n'))
    assert nodes.add(address(1), ('m', 'n')) is first and changes == [1]  # a heartbeat changes nothing
    assert nodes.add(address(1), ('m',), 2.0) is first and first.speed == 2.0 and changes == [1, 1]
    again = nodes.add(address(1), ('m',), 2.0, 'a new key')
    assert again is not first and left == [first] and len(nodes) == 1
    second = nodes.add(address(2), ('o',))
    assert nodes.models() == ['m', 'o'] and nodes.serving('m') == [again]
    with pytest.raises(HttpError, match='LMD-514.*m, o'):
        nodes.serving('z')
    second.down('x')
    assert nodes.models() == ['m']
    with pytest.raises(HttpError, match='LMD-562'):
        nodes.serving('o')
    clock.now += table.FORGET_SECONDS + 1
    nodes.forget()
    assert list(nodes) == [again] and left == [first, second]
    nodes.remove(again.url)
    with pytest.raises(HttpError, match='LMD-568'):
        nodes.remove(again.url)


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(table, 'MOST_NODES', 3)
    nodes = NodeTable()
    for i in range(3):
        nodes.add(address(i + 1), ('m',))
    with pytest.raises(HttpError, match='LMD-567'):
        nodes.add(address(9), ('m',))
    nodes.add(address(1), ('n',))


def test_a_request_is_counted_while_it_lasts():
    node = Node(address(1), ('m',))
    with pytest.raises(ValueError), node.request():
        assert node.unfinished == 1
        raise ValueError
    assert node.unfinished == 0


def test_the_file(tmp_path):
    """As a whole or not at all, for its owner only, and without keys."""
    path = tmp_path / 'folder' / 'nodes.json'
    state = StateFile(path)
    assert state.read() == []
    nodes = [Node(address(1), ('m', 'n'), 2.0), Node(address(2), ('m',), api_key='secret'),
             Node(address(3), ('m',), api_key='common')]
    state.write(nodes, 'common')
    assert [(saved.url, saved.models, saved.speed) for saved in state.read()] == [
        ('http://10.0.0.1:80', ('m', 'n'), 2.0), ('http://10.0.0.3:80', ('m',), None)]
    assert 'secret' not in path.read_text() and 'common' not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(path.parent.iterdir()) == [path]
    for text in ('[', '{"a": 1}', '[{"url": 1, "models": []}]', '[1]', '\xff'):
        path.write_bytes(text.encode('latin-1'))
        with pytest.raises(ConfigError, match='LMD-571'):
            state.read()
    blocked = tmp_path / 'file'
    blocked.write_text('')
    StateFile(blocked / 'nodes.json').write(nodes)  # a warning in the log, and no more


def test_changes_are_written_together(tmp_path, monkeypatch):
    monkeypatch.setattr('lmdeploy.serve.proxy.state.DELAY_SECONDS', 0.05)

    async def main():
        state, nodes = StateFile(tmp_path / 'x.json'), []
        state.later(nodes)
        nodes.append(Node(address(1), ('m',)))
        state.later(nodes)
        assert not state.path.exists()
        await asyncio.sleep(0.1)
        assert len(json.loads(state.path.read_text())) == 1
        nodes.clear()
        state.flush(nodes)
        assert len(state.read()) == 1  # nothing was waiting
        state.later(nodes)
        state.flush(nodes)
        assert state.read() == []

    asyncio.run(main())


def test_keys_of_clients_and_nodes_are_apart():
    for keys in (ProxyKeys(['user'], 'node'), ProxyKeys([], 'node')):
        def ask(key: str, access: Access, keys: ProxyKeys = keys) -> object:
            return keys.authenticate([(b'authorization', f'Bearer {key}'.encode())], access)

        assert ask('node', Access.ADMIN)
        for wrong in ('user', 'nod', 'node1', '', '节点'):
            with pytest.raises(HttpError, match='LMD-560'):
                ask(wrong, Access.ADMIN)
        if keys.required:
            assert ask('user', Access.USER)
            with pytest.raises(HttpError, match='LMD-504'):
                ask('node', Access.USER)


def test_a_trusted_proxy_speaks_for_its_callers():
    """Each of whom is one of their own; nobody else's word is taken."""
    def ask(keys: KeyRing, key: str, *names: str, access: Access = Access.USER):
        headers = [(b'authorization', f'Bearer {key}'.encode()), *((b'x-lmdeploy-caller', n.encode()) for n in names)]
        return keys.authenticate(headers, access)

    for keys in (KeyRing(['user']), KeyRing()):
        required = keys.required
        keys.trust_proxy('secret')
        assert keys.required == required
        one, two = ask(keys, 'secret', 'one'), ask(keys, 'secret', 'two')
        assert one == ask(keys, 'secret', 'one') and one.id != two.id and one.salt != two.salt and one.keyed
        assert not one.admin and ask(keys, 'secret', access=Access.ADMIN).admin
        with pytest.raises(HttpError, match='LMD-505'):
            ask(keys, 'secret', 'one', access=Access.ADMIN)
        assert ask(keys, 'user', 'one').id != one.id


@pytest.mark.parametrize(('host', 'found'), [
    ('127.0.0.1', 'http://127.0.0.1:5'), ('0.0.0.0', 'http://127.0.0.1:5'), ('::', 'http://127.0.0.1:5'),
    ('::1', 'http://[::1]:5'), ('gpu-1', 'http://gpu-1:5')])
def test_the_address_that_a_proxy_reaches(host, found):
    from lmdeploy.serve.fetch import Address

    assert reachable_url('http', host, 5, Address.parse('http://127.0.0.1:8000')) == found
