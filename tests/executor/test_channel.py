"""What crosses between ranks: plans as they are, nothing else."""

from __future__ import annotations

import json
import math
import socket
import threading
from dataclasses import fields

import numpy as np
import pytest

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.vision import Layout
from lmdeploy.engine.plan import Encode, OpenSlot, Place, StepPlan
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.channel import HEADER, Channel, ChannelClosed, ChannelError, elsewhere, pack


@pytest.fixture
def ends():
    a, b = socket.socketpair()
    one, other = Channel(a), Channel(b)
    yield one, other
    one.close()
    other.close()


def same(a, b) -> bool:
    """Equal in type and content; functions by there being one."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if callable(a) and not hasattr(a, '__dataclass_fields__'):
        return b is elsewhere
    if hasattr(a, '__dataclass_fields__'):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and (a == b or a != a)


def plan(**changes) -> StepPlan:
    ints = np.arange(3, dtype=np.int32)
    opened = OpenSlot(1, SamplingParams(temperature=0.5, stop_ids=(1, 2), bad_sequences=((3, 4), (5,)),
                                        logit_bias=((7, -math.inf),), logits_processors=(max, min)),
                      np.arange(5, dtype=np.int32), 4, ((0, 2, 2),))  # fmt: skip
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    picture = Encode(b'\0digest\xff', 2, pixels, Layout((2, 2), (1, 1), 2, 8, 8))
    values = {'step': 7, 'slots': ints, 'starts': ints, 'query_start': np.arange(4, dtype=np.int32), 'tokens': ints,
              'block_start': np.zeros(4, np.int32), 'blocks': np.empty(0, np.int32), 'outputs': np.ones(3, np.uint8),
              'sample': np.array([True, False, True]), 'drafts': np.zeros(3, np.int32), 'opened': (opened,),
              'closed': (3, 1), 'encode': (picture,), 'places': (Place(0, 1, b'\0digest\xff', 1),),
              'mask_rows': np.array([0], np.int32), 'masks': np.arange(4, dtype=np.uint32)[None]}  # fmt: skip
    return StepPlan(**(values | changes))


@pytest.mark.parametrize('value', [
    plan(), plan(opened=(), encode=(), places=(), masks=None, mask_rows=None), EngineConfig(tp=2, session_len=512),
    (1, 'två', None, 2.5, math.inf, True, (), b''), np.zeros((0, 3), np.float32), np.arange(6)[::2],
], ids=['plan', 'plain plan', 'config', 'scalars', 'empty', 'strided'])
def test_what_is_sent_arrives(ends, value):
    ends[0].send('kind', value)
    kind, got = ends[1].receive()
    assert kind == 'kind' and same(value, got)


def test_a_frame_larger_than_any_buffer(ends):
    value = np.arange(3_000_000, dtype=np.int32)
    thread = threading.Thread(target=ends[0].send, args=('plan', value, value))
    thread.start()
    assert all(np.array_equal(value, got) for got in ends[1].receive()[1:])
    thread.join()


def test_a_stand_in_is_never_called():
    with pytest.raises(RuntimeError, match='first rank'):
        elsewhere(None, None)


@pytest.mark.parametrize('value', [object(), {'a': 1}, np.array(['a']), np.array([object()]), dict, 1j])
def test_what_does_not_cross(value):
    with pytest.raises(TypeError, match='cross'):
        pack(('kind', value))


@pytest.mark.parametrize('outline', [
    'nonsense', '1', '[]', '["tuple"]', '["os.system","x"]', '["tuple","a",["array","|O","[1]"]]',
    '["tuple","a",["array","<i4",[9]]]', '["tuple","a",["array","<i4",[-9]]]', '["tuple","a",["bytes",-1]]',
    '["tuple","a",["bytes",99]]', '["tuple","a",["Place",1]]', '["tuple","a",["Path","/"]]', '["tuple","a",{"b":1}]',
])
def test_what_no_rank_sends(ends, outline):
    ends[0].sock.sendall(HEADER.pack(len(outline), 8) + outline.encode() + bytes(8))
    with pytest.raises(ChannelError):
        ends[1].receive()


def test_a_frame_of_impossible_size(ends):
    ends[0].sock.sendall(HEADER.pack(1 << 31, 1 << 62))
    with pytest.raises(ChannelError, match='frame of'):
        ends[1].receive()


def test_the_other_end_goes(ends):
    data = b''.join(bytes(one) for one in pack(('kind', 1)))
    assert json.loads(data[HEADER.size:]) == ['tuple', 'kind', 1]
    ends[0].sock.sendall(data[:-1])
    ends[0].close()
    ends[0].close()
    with pytest.raises(ChannelClosed):
        ends[1].receive()
    with pytest.raises(ChannelClosed):
        for _ in range(100):
            ends[1].send('kind', b'x' * 100_000)
