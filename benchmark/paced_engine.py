"""An engine that is a metronome: what the server costs is measured beside it.

It is started as the engine's process is, and speaks :mod:`lmdeploy.engine.wire`. Every request gets its first token at
once, and one more at each tick of a clock that all processes share: a tick is a multiple of ``1 / rate`` seconds of
``time.monotonic``. Ticks that the machine made late are made up for. With ``rate=0`` they follow each other as fast as
the server takes them.

Options: ``rate=TOKENS_PER_SECOND``, ``core=N`` (the processor to run on), ``tokens=ID,ID,...`` (an answer, repeated),
``times=FILE`` (what the ticks really were: the number and the seconds, a line each, whenever the last answer ends).
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lmdeploy.engine import wire
from lmdeploy.executor.base import Capacity

SESSION = 100_000
CAPACITY = Capacity(num_blocks=1 << 20, block_size=16, max_batch_size=4096, max_step_tokens=8192, session_len=SESSION,
                    vocab_size=1 << 20, device='fake')


@dataclass(slots=True)
class Answer:
    """A running request."""

    prompt_len: int
    most: int
    given: int = 0


class Metronome:
    """Answers over a socket until its peer is gone."""

    def __init__(self, sock: socket.socket, rate: float, tokens: list[int], times: Path) -> None:
        self._sock, self._rate, self._tokens, self._times = sock, rate, tokens, times
        self._frames = wire.Frames()
        self._answers: dict[str, Answer] = {}
        self._counts = dict.fromkeys(wire.STATS, 0) | {'total_blocks': CAPACITY.num_blocks}
        self._sent: list[tuple[int, float]] = []  # number of a tick, and when it was sent

    def run(self) -> None:
        rate, tick = self._rate, 0  # the number of the next one
        while True:
            wait = None if not self._answers else max(0.0, tick / rate - time.monotonic()) if rate else 0.0
            idle = not self._answers
            if select.select([self._sock], [], [], wait)[0] and not self._read():
                return
            now = time.monotonic()
            if idle:
                tick = int(now * rate) + 1
            if self._answers and (not rate or now * rate >= tick):
                self._sent.append((tick, now))
                self._tick(list(self._answers))
                tick += 1

    def _read(self) -> bool:
        data = self._sock.recv(wire.RECEIVE_BYTES)
        for payload in self._frames.feed(data):
            message = wire.to_engine(payload)
            if isinstance(message, wire.Load):
                self._send(wire.Ready(CAPACITY, SESSION, self._stats()))
            elif isinstance(message, wire.Submit):
                self._answers[message.id] = Answer(len(message.tokens), message.params.max_new_tokens)
                self._counts['accepted'] += 1
                self._tick([message.id])
            elif self._answers.pop(message.id, None) is not None:
                self._counts['cancelled'] += 1
                self._send(wire.Step([wire.Delta(message.id, [], 0, 0, wire.Ending('abort'))], self._stats(), 0.0))
        return bool(data)

    def _tick(self, ids: list[str]) -> None:
        deltas = []
        for name in ids:
            answer = self._answers[name]
            token = self._tokens[answer.given % len(self._tokens)]
            answer.given += 1
            ending = None
            if answer.given == answer.most:
                ending = wire.Ending('length')
                del self._answers[name]
                self._counts['finished'] += 1
            deltas.append(wire.Delta(name, [token], answer.prompt_len, 0, ending))
        self._counts['steps'] += 1
        self._send(wire.Step(deltas, self._stats(), 0.0))
        if not self._answers and self._rate:
            self._times.write_text(''.join(f'{number} {seconds!r}\n' for number, seconds in self._sent))
        if not self._answers:
            self._sent.clear()

    def _stats(self) -> list[int]:
        self._counts['running'] = self._counts['in_flight'] = len(self._answers)
        return [self._counts[name] for name in wire.STATS]

    def _send(self, message: wire.ToServer) -> None:
        self._sock.sendall(wire.encode(message))


def main() -> None:
    options = dict(option.split('=') for option in sys.argv[1:-2])
    os.sched_setaffinity(0, {int(options['core'])})
    with socket.socket(fileno=int(sys.argv[-2])) as sock:
        try:
            Metronome(sock, float(options['rate']), [int(token) for token in options['tokens'].split(',')],
                      Path(options['times'])).run()
        except ConnectionError:  # the server has gone
            pass


if __name__ == '__main__':
    main()
