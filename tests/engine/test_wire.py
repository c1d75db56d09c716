"""The wire: what is sent is what arrives, and what is no message raises WireError and nothing else."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy import errors
from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.vision import Layout
from lmdeploy.engine import wire
from lmdeploy.engine.metrics import EngineStats
from lmdeploy.engine.plan import Logprobs
from lmdeploy.engine.request import EngineInput, Finish, ImageSpan, TokenDelta
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import ConfigError, EngineDead, LoadError, RequestError
from lmdeploy.executor.base import Capacity
from lmdeploy.frontend.bad_words import BadWords

CAPACITY = Capacity(100, 16, 8, 256, 2048, 300, 1 << 20, 'cpu', {'attention': 'x'})
STATS = list(range(len(fields(EngineStats))))
TOKENS = st.lists(st.integers(0, 1 << 31), max_size=20)
FLOATS = st.floats(-100, 100, width=32)
PARAMS = st.builds(
    SamplingParams, max_new_tokens=st.integers(0, 1 << 24), greedy=st.booleans(), temperature=FLOATS,
    top_k=st.integers(0, 1000), top_p=FLOATS, seed=st.integers(0, (1 << 64) - 1), stop_ids=TOKENS.map(tuple),
    banned_ids=TOKENS.map(tuple), bad_sequences=st.lists(TOKENS.map(tuple), max_size=3).map(tuple),
    logit_bias=st.lists(st.tuples(st.integers(0, 1000), FLOATS), max_size=5).map(tuple),
    logprobs=st.integers(-1, 5), output_logits=st.sampled_from([None, 'all', 'generation']))
REQUESTS = st.builds(
    EngineInput, id=st.text(max_size=30), tokens=TOKENS, params=PARAMS, salt=st.binary(max_size=8), tenant=st.text(),
    priority=st.integers(-9, 9), share=st.none() | st.text(max_size=5),
    images=st.lists(st.builds(
        lambda start, digest, tiles: ImageSpan(
            start, start + tiles, digest, Layout((9, 5), (1, tiles), tiles, tiles, 4),
            np.full((tiles, 3, 2, 1), start, np.uint8)),
        st.integers(0, 9), st.binary(max_size=4), st.integers(1, 3)), max_size=3).map(tuple))


def payload(message):
    return bytes(wire.encode(message)[wire.HEADER_BYTES:])


def deltas_of(*deltas):
    """What arrives of ``deltas``, message by message."""
    return [part.delta() for message in wire.steps(deltas, STATS, 0.1)
            for part in wire.to_server(payload(message)).deltas]


@given(REQUESTS)
def test_requests_arrive_as_they_are(request):
    *pixels, message = map(wire.to_engine, wire.Frames().feed(bytes(wire.submission(request))))
    arrived = message.request([picture.array() for picture in pixels])
    assert replace(arrived, images=()) == replace(request, images=())
    assert all(picture.id == request.id for picture in pixels) and len(arrived.images) == len(request.images)
    for image, sent in zip(arrived.images, request.images):
        assert (image.start, image.end, image.digest, image.layout) == (sent.start, sent.end, sent.digest, sent.layout)
        assert np.array_equal(image.pixels, sent.pixels) and image.pixels.dtype == np.uint8


def test_pixels_that_do_not_fit_are_no_message():
    with pytest.raises(wire.WireError):
        wire.Pixels('a', (1, 3, 2, 2), b'x' * 11).array()
    with pytest.raises(wire.WireError):
        wire.Submit.of(EngineInput('a', [1], SamplingParams())).request([np.zeros((1, 3, 1, 1), np.uint8)])


def test_every_parameter_but_functions_crosses():
    names = {field.name for field in fields(SamplingParams)}
    assert set(wire.Sampling.__struct_fields__) == names - {'logits_processors'}


def test_configuration_and_capacity_arrive_as_they_are():
    config = EngineConfig(dtype='float32', num_blocks=7, session_len=None, depth=2)
    load = wire.to_engine(payload(wire.Load(config, '/a', 30)))
    assert load.config == config and isinstance(load.config, EngineConfig)
    ready = wire.to_server(payload(wire.Ready(CAPACITY, 2048, STATS)))
    assert ready.capacity == CAPACITY and ready.stats == STATS


class OneToken:
    """A tokenizer with a vocabulary of one."""

    vocab_size = 1

    def token_bytes(self, token):
        return b'x'


def test_bad_words_and_grammars_cross_as_text():
    params = SamplingParams(logits_processors=(BadWords(['no', '不'], OneToken(), 3),))
    grammar = SimpleNamespace(source=SimpleNamespace(kind='regex', text='a+'))
    request = EngineInput('a', [1, 2, 3], params, grammar=grammar)
    message = wire.to_engine(bytes(wire.submission(request)[wire.HEADER_BYTES:]))
    assert message.bad_words == [(['no', '不'], 3)]
    assert (message.grammar.kind, message.grammar.text) == ('regex', 'a+')


@pytest.mark.parametrize('change, code', [
    ({'params': SamplingParams(logits_processors=(lambda ids, logits: logits,))}, 'LMD-341'),
    ({'grammar': object()}, 'LMD-341'),
    ({'tokens': [1.5]}, 'LMD-348'),
    ({'tokens': [np.int64(1)]}, 'LMD-348'),
    ({'tokens': [1 << 70]}, 'LMD-348'),
    ({'tokens': [True]}, 'LMD-348'),
    ({'params': SamplingParams(temperature='hot')}, 'LMD-348'),
    ({'params': SamplingParams(output_logits='some')}, 'LMD-348'),
    ({'id': None}, 'LMD-348'),
])  # fmt: skip
def test_what_cannot_cross_is_refused_before_it_is_sent(change, code):
    request = EngineInput(**({'id': 'a', 'tokens': [1], 'params': SamplingParams()} | change))
    with pytest.raises(RequestError) as caught:
        wire.submission(request)
    assert caught.value.code == code


def test_deltas_arrive_as_they_are():
    logprobs = Logprobs(np.array([-1, -2], np.float32), np.array([[1, 2], [3, 4]], np.int32),
                        np.array([[0, -1], [-1, -5]], np.float32))
    sent = TokenDelta('a', [1, 2], Finish('stop', 7), logprobs, np.arange(6, dtype=np.float32).reshape(2, 3),
                      np.ones((2, 4), np.float64), 5, 9)
    plain = TokenDelta('b', [3], None, cached_tokens=1, prompt_len=2)
    got, other = deltas_of(sent, plain)
    assert other == plain
    assert (got.id, got.tokens, got.finish, got.cached_tokens, got.prompt_len) == ('a', [1, 2], Finish('stop', 7), 5, 9)
    for name in ('chosen', 'ids', 'values'):
        assert np.array_equal(getattr(got.logprobs, name), getattr(logprobs, name))
        assert getattr(got.logprobs, name).dtype == getattr(logprobs, name).dtype
    assert np.array_equal(got.logits, sent.logits) and np.array_equal(got.hidden, sent.hidden)


def test_log_probabilities_without_alternatives_arrive():
    logprobs = Logprobs(np.zeros(1, np.float32), np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32))
    (got,) = deltas_of(TokenDelta('a', [1], logprobs=logprobs))
    assert got.logprobs.ids.shape == (1, 0) and got.logprobs.chosen.shape == (1,)


def test_large_arrays_are_sent_in_parts(monkeypatch):
    monkeypatch.setattr(wire, 'PART_BYTES', 1000)
    logits = np.arange(100 * 20, dtype=np.float32).reshape(100, 20)
    hidden = np.arange(40 * 50, dtype=np.float32).reshape(40, 50)
    sent = [TokenDelta('a', [5], Finish('length'), logits=logits), TokenDelta('b', [6], logits=logits, hidden=hidden)]
    messages = list(wire.steps(sent, STATS, 0.1))
    assert len(messages) > 3 and max(len(payload(message)) for message in messages) < 4000
    got = deltas_of(*sent)
    for name in 'ab':
        parts = [delta for delta in got if delta.id == name]
        assert np.array_equal(np.concatenate([d.logits for d in parts if d.logits is not None]), logits)
        assert all(not part.tokens and part.finish is None for part in parts[:-1])
    assert np.array_equal(np.concatenate([d.hidden for d in got if d.hidden is not None]), hidden)
    assert [delta.tokens for delta in got if delta.tokens] == [[5], [6]]


@pytest.mark.parametrize('error', [
    LoadError('LMD-120', path='/a', reason='b'),
    ConfigError('LMD-222', field='tp', value=3, least=1, most=2),
    RequestError('LMD-330', prompt_len=3, most=2),
    EngineDead('LMD-338', cause='x' * 10000),
    EngineDead('LMD-345', crashes=3, seconds=60.0, cause='y'),
])  # fmt: skip
def test_errors_keep_class_code_and_text(error):
    got = wire.to_server(payload(wire.Failed(wire.Error.of(error)))).error.error()
    assert type(got) is type(error) and got.code == error.code
    assert str(got)[:300] == str(error)[:300] and got.text('zh')[:300] == error.text('zh')[:300]


def test_error_parameters_of_other_kinds_become_text():
    error = RequestError('LMD-337', cause=ValueError('bad'))
    assert wire.Error.of(error).error().params == {'cause': 'bad'}
    assert wire.Error.of(RequestError('LMD-337', cause=1 << 80)).error().params == {'cause': str(1 << 80)}


def test_every_class_of_errors_can_cross():
    ours = {value for value in vars(errors).values()
            if isinstance(value, type) and issubclass(value, errors.LmdeployError)}
    assert set(wire.ERRORS.values()) == ours

    class Other(RequestError):
        pass

    assert type(wire.Error.of(Other('LMD-337', cause='x')).error()) is RequestError


@pytest.mark.parametrize('name, code, params', [
    ('SystemExit', 'LMD-338', {'cause': 'x'}), ('EngineDead', 'LMD-999', {}), ('EngineDead', 'LMD-338', {}),
    ('EngineDead', 'LMD-338', {'self': 1}), ('EngineDead', 'LMD-338', {'code': 'LMD-338'}),
    ('EngineDead', 'LMD-345', {'crashes': 1, 'seconds': 'x', 'cause': ''}),
])  # fmt: skip
def test_errors_that_are_none_are_refused(name, code, params):
    message = wire.to_server(payload(wire.Failed(wire.Error(name, code, params))))
    with pytest.raises(wire.WireError):
        message.error.error()


@pytest.mark.parametrize('array', [
    ('<f4', [2, 2], b'0' * 15), ('<f4', [1 << 31, 1 << 31], b'0' * 16), ('<f4', [0, 1 << 31], b'0'),
    ('<f4', [4], b'0' * 16), ('<f4', [1, 1, 4], b'0' * 16), ('|O', [2], b'0' * 16), ('<f4', [-1, -4], b'0' * 16),
    ('<U4', [1, 1], b'0' * 16), ('<f4', [], b''), ('<f4', [1 << 40, 0], b''),
])  # fmt: skip
def test_arrays_that_are_none_are_refused(array):
    step = ['step', [['a', [], 0, 0, None, [None, array, None]]], STATS, 0.1]
    with pytest.raises(wire.WireError):
        wire.to_server(msgspec.msgpack.encode(step)).deltas[0].delta()


def test_log_probabilities_must_fit_the_tokens():
    one = Logprobs(np.zeros(1, np.float32), np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32))
    for tokens, values in (([1, 2], one.values), ([1], np.zeros((1, 3), np.float32))):
        with pytest.raises(wire.WireError):
            deltas_of(TokenDelta('a', tokens, logprobs=Logprobs(one.chosen, one.ids, values)))


@given(st.lists(st.binary(max_size=50), max_size=10), st.integers(0, 1 << 30))
def test_frames_survive_any_cut(payloads, seed):
    stream = b''.join(len(p).to_bytes(4, 'little') + p for p in payloads)
    cutter, frames, got = random.Random(seed), wire.Frames(), []
    while stream:
        cut = cutter.randint(1, 60)
        got += frames.feed(stream[:cut])
        stream = stream[cut:]
    assert got == payloads


def test_a_frame_beyond_the_limit_is_refused_before_it_arrives():
    with pytest.raises(wire.WireError):
        wire.Frames().feed((wire.MAX_FRAME + 1).to_bytes(4, 'little'))
    with pytest.raises(wire.WireError):
        wire.encode(wire.Stage('x' * (wire.MAX_FRAME + 1)))


SAMPLES = [
    payload(wire.Load(EngineConfig(), '/a', 30)), payload(wire.Abort('a')),
    bytes(wire.submission(EngineInput('a', [1, 2], SamplingParams(logit_bias=((1, 2.0),))))[wire.HEADER_BYTES:]),
    payload(wire.Stage('loading')), payload(wire.Ready(CAPACITY, 2048, STATS)), payload(wire.Running(['a', 'b'])),
    payload(wire.Failed(wire.Error.of(EngineDead('LMD-338', cause='x')))), payload(wire.Ended('a', None)),
    *(payload(message) for message in wire.steps([
        TokenDelta('a', [1], Finish('error', error=RequestError('LMD-330', prompt_len=1, most=2))),
        TokenDelta('b', [1], logits=np.ones((1, 3), np.float32),
                   logprobs=Logprobs(np.zeros(1), np.zeros((1, 1), np.int32), np.zeros((1, 1))))],
        STATS, 0.1)),
]  # fmt: skip


def read(data):
    """Decode by both sides' rules and use all there is; how many were refused."""
    refused = 0
    for decode in (wire.to_engine, wire.to_server):
        try:
            message = decode(data)
            if isinstance(message, wire.Step):
                for part in message.deltas:
                    part.delta()
            elif isinstance(message, wire.Submit):
                message.request()
            elif isinstance(message, (wire.Failed, wire.Ended)) and message.error is not None:
                message.error.error()
        except wire.WireError:
            refused += 1
    return refused


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    assert read(data) == 2


def test_mutated_messages_are_messages_or_refused():
    dice = random.Random(0)
    refused = 0
    for _ in range(5000):
        data = bytearray(dice.choice(SAMPLES))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data))
            how = dice.randrange(4)
            if how == 0:
                data[at] = dice.randrange(256)
            elif how == 1:
                del data[at:at + dice.randint(1, 5)]
            elif how == 2:
                data[at:at] = dice.randbytes(dice.randint(1, 5))
            else:
                data[at:at] = data[dice.randrange(len(data)):][:20]
            if not data:
                break
        refused += read(bytes(data))
    assert refused > 5000  # at least one of the two sides


def test_nesting_does_not_exhaust_the_stack():
    deep = b'\x91' * 100_000 + b'\xc0'
    assert read(deep) == 2
    assert read(b'\x93\xa6failed' + deep) == 2
