"""Messages between the first rank and the others: values in, values out, over a stream socket of the same user.

A frame is a fixed header, an outline in JSON, and the raw bytes of the arrays that the outline mentions. Only what is
listed in :data:`RECORDS` can cross, and only as data: nothing that is received can name or run code. Functions of the
caller (logits processors) stay with the first rank; the others get as many stand-ins, see :func:`elsewhere`.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from dataclasses import fields
from typing import Any

import numpy as np

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.vision import Layout
from lmdeploy.engine.plan import Encode, OpenSlot, Place, StepPlan
from lmdeploy.engine.sampling import SamplingParams

HEADER = struct.Struct('<IQ')  # bytes of the outline, bytes of all arrays
MAX_FRAME = 1 << 32
RECORDS: dict[str, type] = {cls.__name__: cls for cls in (
    StepPlan, OpenSlot, Encode, Place, Layout, SamplingParams, EngineConfig)}  # fmt: skip
DTYPES = {'|b1', '|i1', '|u1', '<i2', '<i4', '<u4', '<i8', '<u8', '<f4', '<f8'}


class ChannelError(Exception):
    """The other end sent what no rank sends."""


class ChannelClosed(ChannelError):
    """The other end has gone."""


def elsewhere(token_ids: Any, logits: Any) -> Any:
    """In the place of a function that the first rank alone has; it is never called."""
    raise RuntimeError('this function runs on the first rank only')


def pack(value: Any) -> list[Any]:
    """``value`` as buffers to be sent one after the other."""
    arrays: list[Any] = []
    outline = json.dumps(_outline(value, arrays), separators=(',', ':')).encode()
    return [HEADER.pack(len(outline), sum(memoryview(a).nbytes for a in arrays)), outline, *arrays]


def _outline(value: Any, arrays: list[Any]) -> Any:
    """``value`` in JSON: records, tuples, arrays and bytes become lists that begin with their kind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        if array.dtype.str not in DTYPES:
            raise TypeError(f'arrays of {array.dtype} do not cross')
        if array.size:
            arrays.append(array.reshape(-1).view(np.uint8))
        return ['array', array.dtype.str, list(value.shape)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        arrays.append(value)
        return ['bytes', len(value)]
    if isinstance(value, (tuple, list)):
        return ['tuple', *(_outline(item, arrays) for item in value)]
    if callable(value) and not isinstance(value, type):
        return ['elsewhere']
    name = type(value).__name__
    if RECORDS.get(name) is not type(value):
        raise TypeError(f'a {name} does not cross')
    return [name, *(_outline(getattr(value, one.name), arrays) for one in fields(value))]  # type: ignore[arg-type]


def _value(outline: Any, data: memoryview, at: list[int]) -> Any:
    """The value of an outline; ``at`` is how much of ``data`` is used up."""
    if isinstance(outline, dict):
        raise ValueError('a mapping')
    if not isinstance(outline, list):
        return outline
    kind, *rest = outline
    if kind == 'array':
        name, shape = rest
        dtype = np.dtype(name) if name in DTYPES else None
        if dtype is None:
            raise ValueError(f'type {name!r}')
        raw = _take(data, at, math.prod(shape) * dtype.itemsize)
        return np.frombuffer(raw, dtype).reshape(shape) if len(raw) else np.empty(shape, dtype)
    if kind == 'bytes':
        return bytes(_take(data, at, rest[0]))
    if kind == 'tuple':
        return tuple(_value(item, data, at) for item in rest)
    if kind == 'elsewhere':
        return elsewhere
    cls = RECORDS[kind]
    names = [one.name for one in fields(cls)]
    return cls(**dict(zip(names, (_value(item, data, at) for item in rest), strict=True)))


def _take(data: memoryview, at: list[int], size: int) -> memoryview:
    begin = at[0]
    at[0] = begin + size
    if size < 0 or at[0] > len(data):
        raise ValueError('an array beyond its frame')
    return data[begin : at[0]]


class Channel:
    """One end of a socket pair. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._sending = threading.Lock()

    def send(self, *message: Any) -> None:
        """Send a tuple of values.

        Raises:
            ChannelClosed: the other end has gone.
        """
        buffers = [memoryview(one).cast('B') for one in pack(message)]
        try:
            with self._sending:
                while buffers:
                    sent = self.sock.sendmsg(buffers[:512])
                    while buffers and sent >= len(buffers[0]):
                        sent -= len(buffers.pop(0))
                    if sent:
                        buffers[0] = buffers[0][sent:]
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> tuple[Any, ...]:
        """The next message; blocks.

        Raises:
            ChannelClosed: the other end has gone.
            ChannelError: it sent something else.
            TimeoutError: the socket has a time limit and it has passed.
        """
        small, large = HEADER.unpack(self._read(HEADER.size))
        if small + large > MAX_FRAME:
            raise ChannelError(f'a frame of {small + large} bytes')
        frame = self._read(small + large)
        try:
            value = _value(json.loads(bytes(frame[:small])), memoryview(frame)[small:], [0])
        except (ValueError, KeyError, TypeError) as error:
            raise ChannelError(f'not a message: {error}') from error
        if not isinstance(value, tuple) or not value:
            raise ChannelError('not a message')
        return value

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            try:
                count = self.sock.recv_into(view[got:])
            except TimeoutError:
                raise
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not count:
                raise ChannelClosed('the other end is closed')
            got += count
        return data

    def close(self) -> None:
        """Close this end; the other one notices."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was closed already
        self.sock.close()
