"""Streams: the requests that have not ended, and what their consumers have not read yet. All of one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from lmdeploy.engine.request import EngineInput, Finish, TokenDelta
from lmdeploy.engine.suspects import Trial
from lmdeploy.engine.wire import WireError
from lmdeploy.errors import RequestError


@dataclass(slots=True, eq=False)
class Stream:
    """A request and its deltas. A consumer that falls behind gets the tokens of several steps at once."""

    request: EngineInput
    loop: asyncio.AbstractEventLoop
    trial: Trial | None = None
    running: bool = False  # it was in a step
    generated: int = 0  # tokens
    closed: bool = False  # nobody reads any more
    deltas: deque[TokenDelta] = field(default_factory=deque)
    waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> None:
        """Add ``delta``, or its tokens and finish to one that waits."""
        if self.closed:
            return
        last = self.deltas[-1] if self.deltas else None
        if last is not None and _plain(last) and _plain(delta):
            last.tokens += delta.tokens
            last.finish = delta.finish
        else:
            self.deltas.append(delta)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def next(self) -> TokenDelta:
        """The next delta."""
        while not self.deltas:
            self.waiter = self.loop.create_future()
            await self.waiter
        return self.deltas.popleft()


def _plain(delta: TokenDelta) -> bool:
    return delta.logprobs is None and delta.logits is None and delta.hidden is None


class Streams:
    """By request id, until the engine has told the end."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request: EngineInput, loop: asyncio.AbstractEventLoop, trial: Trial | None = None) -> Stream:
        """A stream for ``request``.

        Raises:
            RequestError: LMD-333, there is one of that id.
        """
        if request.id in self._streams:
            raise RequestError('LMD-333', id=request.id)
        stream = self._streams[request.id] = Stream(request, loop, trial)
        return stream

    def run(self, ids: Iterable[str]) -> None:
        """These requests are in a step now."""
        for request_id in ids:
            self._find(request_id).running = True

    def deliver(self, delta: TokenDelta) -> None:
        """Hand ``delta`` to its consumer.

        Raises:
            WireError: its request is not there.
        """
        stream = self._find(delta.id)
        stream.generated += len(delta.tokens)
        finish = delta.finish
        if finish is not None:
            del self._streams[delta.id]
        if stream.trial is not None:
            stream.trial.saw(stream.generated, ended=finish is not None and finish.reason in ('stop', 'length'))
        stream.push(delta)

    def end_all(self, finish: Finish) -> list[Stream]:
        """End every stream; returns them."""
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.push(TokenDelta(stream.request.id, [], finish))
        return streams

    def _find(self, request_id: str) -> Stream:
        stream = self._streams.get(request_id)
        if stream is None:
            raise WireError('a message about a request that is not there')
        return stream
