"""What crosses between the server and the engine's process: messages, their checks, and frames on a stream socket.

A frame is a 4-byte little-endian length and as many bytes of msgpack, whose schema is one of the two unions below.
Nothing in it is an object of Python: arrays are raw bytes with a type from a list and a shape that must fit them,
errors are the name of a class from a closed set with a code and plain parameters. What does not fit raises
:class:`WireError`, and the peer that sent it is not listened to any more.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta, Struct

from lmdeploy import errors
from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.vision import Layout
from lmdeploy.engine.metrics import EngineStats
from lmdeploy.engine.plan import Logprobs
from lmdeploy.engine.request import EngineInput, Finish, ImageSpan, TokenDelta
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import LmdeployError, RequestError
from lmdeploy.executor.base import Capacity
from lmdeploy.texts import table

MAX_FRAME = 64 << 20  # bytes
PART_BYTES = 8 << 20  # a delta with larger arrays is sent in parts
HEADER_BYTES = 4
RECEIVE_BYTES = 256 << 10
MAX_ERROR_TEXT = 4000  # characters of one parameter of an error

ERRORS: dict[str, type[LmdeployError]] = {
    name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, LmdeployError)}
Scalar = int | float | str | bool | None
Count = Annotated[int, Meta(ge=0)]
Side = Annotated[int, Meta(ge=1, le=1 << 24)]
STATS = tuple(field.name for field in fields(EngineStats))
stats_values = attrgetter(*STATS)
DTYPES = {name: np.dtype(name) for name in ('<f4', '<f8', '<i4', '<i8')}


class WireError(Exception):
    """A frame that no correct peer sends."""


class Array(Struct, array_like=True, frozen=True, gc=False):
    """A vector or matrix, row by row."""

    dtype: Literal['<f4', '<f8', '<i4', '<i8']
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(min_length=1, max_length=2)]
    data: bytes

    @classmethod
    def of(cls, values: Any) -> Array:
        """From a numpy array or a CPU tensor."""
        array = np.asarray(values)
        return cls(array.dtype.str, list(array.shape), array.tobytes())

    def array(self, *, dims: int) -> np.ndarray:
        """A read-only array of ``dims`` dimensions over the received bytes.

        Raises:
            WireError: shape and bytes do not belong together.
        """
        dtype = DTYPES[self.dtype]
        if len(self.shape) != dims or math.prod(self.shape) * dtype.itemsize != len(self.data):
            raise WireError(f'an array of shape {self.shape} and type {self.dtype} in {len(self.data)} bytes')
        return np.frombuffer(self.data, dtype).reshape(self.shape) if self.data else np.empty(self.shape, dtype)


class Error(Struct, array_like=True, frozen=True):
    """An error as data."""

    name: str
    code: str
    params: dict[str, Scalar | list[Scalar]]

    @classmethod
    def of(cls, error: LmdeployError) -> Error:
        """What is left of ``error`` for another process; parameters of other kinds become text."""
        name = next(cls.__name__ for cls in type(error).__mro__ if ERRORS.get(cls.__name__) is cls)
        return cls(name, error.code, {key: _plain(value) for key, value in error.params.items()})

    def error(self) -> LmdeployError:
        """The error itself.

        Raises:
            WireError: there is no such class, code or text.
        """
        if self.name not in ERRORS or self.code not in table():
            raise WireError(f'an error of unknown kind {self.name!r}, {self.code!r}')
        try:
            return ERRORS[self.name](self.code, **self.params)
        except (LookupError, ValueError, TypeError, AttributeError) as cause:
            raise WireError(f'an error {self.code} without the parameters of its text') from cause


def _plain(value: object) -> Scalar | list[Scalar]:
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and -1 << 63 <= value < 1 << 64:
        return int(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, float)) for item in value):
        return [_plain(item) for item in value]  # type: ignore[misc]
    return str(value)[:MAX_ERROR_TEXT]


# -- from the server to the engine --------------------------------------------------------------------------------

# the parameters of a request that are data: all but the functions
Sampling = msgspec.defstruct(
    'Sampling', [(name, hint) for name, hint in get_type_hints(SamplingParams).items() if name != 'logits_processors'],
    array_like=True, frozen=True)
_SAMPLING = Sampling.__struct_fields__
_sampling_values = attrgetter(*_SAMPLING)


class Load(Struct, array_like=True, tag='load', frozen=True):
    """The first message: which engine to build."""

    config: EngineConfig
    path: str
    log_level: int


class GrammarSpec(Struct, array_like=True, frozen=True):
    """A grammar as text; see :class:`lmdeploy.grammar.formats.Source`."""

    kind: str
    text: str


class Pixels(Struct, array_like=True, tag='pixels', frozen=True, gc=False):
    """A picture of the request of that id, which follows: ``[tiles, 3, H, W]`` bytes."""

    id: str
    shape: tuple[Side, Side, Side, Side]
    data: bytes

    def array(self) -> np.ndarray:
        """The pixels, read-only.

        Raises:
            WireError: shape and bytes do not belong together.
        """
        if math.prod(self.shape) != len(self.data):
            raise WireError(f'pixels of shape {self.shape} in {len(self.data)} bytes')
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


class Span(Struct, array_like=True, frozen=True):
    """An :class:`~lmdeploy.engine.request.ImageSpan` without its pixels."""

    start: Count
    end: Count
    digest: bytes
    layout: Layout


class Submit(Struct, array_like=True, tag='submit', frozen=True):
    """A request. Bad words and the grammar are texts here, and become code again in the engine's process; pictures
    have come before it."""

    id: str
    tokens: list[int]
    params: Sampling  # type: ignore[valid-type]
    salt: bytes
    tenant: str
    priority: int
    images: list[Span]
    share: str | None
    adapter: str
    bad_words: list[tuple[list[str], Count]]  # words, and where the answer begins
    grammar: GrammarSpec | None

    @classmethod
    def of(cls, request: EngineInput) -> Submit:
        """``request`` as data.

        Raises:
            RequestError: LMD-341, a part of it is Python code of this process.
        """
        bad_words = []
        for processor in request.params.logits_processors:
            words = getattr(processor, 'texts', None)
            if words is None:
                raise RequestError('LMD-341', what='logits_processors')
            bad_words.append((list(words), processor.prompt_len))  # type: ignore[attr-defined]
        grammar = None
        if request.grammar is not None:
            source = getattr(request.grammar, 'source', None)
            if source is None:
                raise RequestError('LMD-341', what='grammar')
            grammar = GrammarSpec(source.kind, source.text)
        return cls(request.id, request.tokens, Sampling(*_sampling_values(request.params)), request.salt,
                   request.tenant, request.priority,
                   [Span(i.start, i.end, i.digest, i.layout) for i in request.images], request.share, request.adapter,
                   bad_words, grammar)

    def request(self, pixels: Sequence[np.ndarray] = ()) -> EngineInput:
        """The request without its bad words and grammar, with the pixels of its pictures.

        Raises:
            WireError: there are more pictures than pixels, or fewer.
        """
        if len(pixels) != len(self.images):
            raise WireError(f'{len(self.images)} pictures with the pixels of {len(pixels)}')
        params = SamplingParams(**{name: getattr(self.params, name) for name in _SAMPLING})
        images = tuple(ImageSpan(span.start, span.end, span.digest, span.layout, array)
                       for span, array in zip(self.images, pixels))
        return EngineInput(self.id, self.tokens, params, self.salt, self.tenant, self.priority, images, self.share,
                           self.adapter)


class Abort(Struct, array_like=True, tag='abort', frozen=True, gc=False):
    """End a request."""

    id: str


ToEngine = Load | Pixels | Submit | Abort


# -- from the engine to the server ---------------------------------------------------------------------------------

class Ending(Struct, array_like=True, frozen=True, gc=False):
    """A :class:`~lmdeploy.engine.request.Finish`."""

    reason: Literal['stop', 'length', 'abort', 'error']
    stop_id: int | None = None
    error: Error | None = None


class Outputs(Struct, array_like=True, frozen=True):
    """The arrays of a delta: chosen, ids and values of log-probabilities; rows of logits and of hidden states."""

    logprobs: tuple[Array, Array, Array] | None = None
    logits: Array | None = None
    hidden: Array | None = None


class Delta(Struct, array_like=True, frozen=True, gc=False):
    """A :class:`~lmdeploy.engine.request.TokenDelta`."""

    id: str
    tokens: list[int]
    prompt_len: Count
    cached_tokens: Count
    finish: Ending | None = None
    outputs: Outputs | None = None

    def delta(self) -> TokenDelta:
        """The delta itself.

        Raises:
            WireError: an array or the error is not what it should be.
        """
        delta = TokenDelta(self.id, self.tokens, None, None, None, None, self.cached_tokens, self.prompt_len)
        if self.finish is not None:
            error = self.finish.error
            delta.finish = Finish(self.finish.reason, self.finish.stop_id, None if error is None else error.error())
        if self.outputs is not None:
            self._add_outputs(delta, self.outputs)
        return delta

    def _add_outputs(self, delta: TokenDelta, outputs: Outputs) -> None:
        if outputs.logprobs is not None:
            chosen, ids, values = outputs.logprobs
            found = delta.logprobs = Logprobs(chosen.array(dims=1), ids.array(dims=2), values.array(dims=2))
            if not len(found.chosen) == len(found.ids) == len(self.tokens) or found.ids.shape != found.values.shape:
                raise WireError('log-probabilities that do not belong to the tokens')
        if outputs.logits is not None:
            delta.logits = outputs.logits.array(dims=2)
        if outputs.hidden is not None:
            delta.hidden = outputs.hidden.array(dims=2)


class Stage(Struct, array_like=True, tag='stage', frozen=True):
    """What the engine is busy with until it is ready."""

    text: Annotated[str, Meta(max_length=1000)]


class Ready(Struct, array_like=True, tag='ready', frozen=True):
    """The model is loaded."""

    capacity: Capacity
    context_len: Count
    stats: list[int]


class Failed(Struct, array_like=True, tag='failed', frozen=True):
    """The last message: the engine could not load, or cannot go on."""

    error: Error


class Running(Struct, array_like=True, tag='running', frozen=True):
    """The requests that take part in steps from now on; sent before the first such step."""

    ids: list[str]


class Ended(Struct, array_like=True, tag='ended', frozen=True):
    """A request that never reached the engine: refused for ``error``, or aborted."""

    id: str
    error: Error | None


class Step(Struct, array_like=True, tag='step', frozen=True):
    """All deltas of a step, the engine's counters after it, and the seconds of the slowest step since the last one."""

    deltas: list[Delta]
    stats: list[int]
    seconds: float


ToServer = Stage | Ready | Failed | Running | Ended | Step


def delta_parts(delta: TokenDelta) -> Iterator[Delta]:
    """``delta`` for the wire; several, of whole rows, if its arrays are large. Tokens and finish come with the last."""
    finish = delta.finish
    ending = None
    if finish is not None:
        ending = Ending(finish.reason, finish.stop_id, None if finish.error is None else Error.of(finish.error))
    if delta.logprobs is None and delta.logits is None and delta.hidden is None:
        yield Delta(delta.id, delta.tokens, delta.prompt_len, delta.cached_tokens, ending)
        return
    logits, hidden = (None if value is None else np.asarray(value) for value in (delta.logits, delta.hidden))
    arrays = [array for array in (logits, hidden) if array is not None]

    def cut(start: int, end: int, logprobs: tuple[Array, Array, Array] | None = None) -> Outputs:
        return Outputs(logprobs, *(None if array is None or start and start >= len(array) else
                                   Array.of(array[start:end]) for array in (logits, hidden)))

    rows = min((max(1, PART_BYTES // max(1, array[:1].nbytes)) for array in arrays), default=1)
    start, total = 0, max((len(array) for array in arrays), default=0)
    while total - start > rows:
        yield Delta(delta.id, [], delta.prompt_len, delta.cached_tokens, None, cut(start, start + rows))
        start += rows
    found = delta.logprobs
    logprobs = None if found is None else (Array.of(found.chosen), Array.of(found.ids), Array.of(found.values))
    yield Delta(delta.id, delta.tokens, delta.prompt_len, delta.cached_tokens, ending, cut(start, total, logprobs))


def steps(deltas: Iterable[TokenDelta], stats: list[int], seconds: float) -> Iterator[Step]:
    """The messages of a step: one, unless its arrays are large."""
    batch: list[Delta] = []
    size = 0
    for delta in deltas:
        for part in delta_parts(delta):
            if part.outputs is not None:
                new = sum(len(array.data) for array in (part.outputs.logits, part.outputs.hidden) if array is not None)
                if size and size + new > 2 * PART_BYTES:
                    yield Step(batch, stats, seconds)
                    batch, size = [], 0
                size += new
            batch.append(part)
    yield Step(batch, stats, seconds)


# -- frames --------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_server = msgspec.msgpack.Decoder(ToServer)


def encode(message: ToEngine | ToServer) -> bytearray:
    """``message`` as a frame."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    size = len(frame) - HEADER_BYTES
    if size > MAX_FRAME:
        raise WireError(f'a message of {size} bytes; {MAX_FRAME} is the most')
    frame[:HEADER_BYTES] = size.to_bytes(HEADER_BYTES, 'little')
    return frame


def submission(request: EngineInput) -> bytearray:
    """The frames of ``request``, read once by the rules of their receiver: a bad one must not cost the connection.

    Raises:
        RequestError: LMD-341, a part of it is Python code; LMD-348, a part of it is of the wrong type.
    """
    try:
        frame = encode(Submit.of(request))
        to_engine(memoryview(frame)[HEADER_BYTES:])
        if request.images:
            pixels = [encode(Pixels(request.id, span.pixels.shape, span.pixels.tobytes())) for span in request.images]
            for one in pixels:
                to_engine(memoryview(one)[HEADER_BYTES:])
            frame = bytearray().join([*pixels, frame])
    except (WireError, TypeError, OverflowError, ValueError) as error:
        raise RequestError('LMD-348', reason=error) from error
    return frame


def to_engine(payload: bytes | memoryview) -> ToEngine:
    """A message of the server.

    Raises:
        WireError: it is none.
    """
    return _decode(_to_engine, payload)


def to_server(payload: bytes) -> ToServer:
    """A message of the engine.

    Raises:
        WireError: it is none.
    """
    return _decode(_to_server, payload)


def _decode(decoder: msgspec.msgpack.Decoder, payload: bytes | memoryview) -> Any:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError(f'a message that is none: {error}') from error


class Frames:
    """Cuts what arrives into the payloads of whole frames; a length beyond the limit is refused before its bytes."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that ``data`` completes.

        Raises:
            WireError: a frame is too long.
        """
        source: bytes | bytearray = data
        if self._rest:
            self._rest += data
            source = self._rest
        payloads = []
        at, end = 0, len(source)
        while end - at >= HEADER_BYTES:
            start = at + HEADER_BYTES
            size = int.from_bytes(source[at:start], 'little')
            if size > self._limit:
                raise WireError(f'a frame of {size} bytes; {self._limit} is the most')
            if end - start < size:
                break
            payloads.append(bytes(source[start:start + size]))
            at = start + size
        if source is data:
            self._rest = bytearray(data[at:])
        elif at:
            del self._rest[:at]
        return payloads


def receive(sock: socket.socket, frames: Frames) -> Iterator[bytes]:
    """The payloads that arrive on a blocking socket, until its peer has closed.

    Raises:
        WireError: a frame is too long.
    """
    while True:
        try:
            data = sock.recv(RECEIVE_BYTES)
        except ConnectionError:  # the peer is gone, and with it what it had not read
            return
        if not data:
            return
        yield from frames.feed(data)
