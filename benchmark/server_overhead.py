"""What the server costs beside the engine: a paced engine, real TCP, and the server's process on one core.

    python benchmark/server_overhead.py [MODEL] [--streams 64] [--rate 50]

The engine is ``benchmark/paced_engine.py``, so every token has a time at which it is due. The server runs on one core,
engine and client on another. Reported are

* lateness: of each token of the streams, from the moment the engine sends it until a client has it; a token is late
  after 20 ms. How late the engine itself was, which is the machine's doing, is told beside it;
* cost: processor time of the server's process per token, and tokens per event (above one: some were joined);
* the highest rate at which at most one token in a hundred is late, and what passes if the engine does not wait;
* time to first token on an idle server and beside the streams, from opening the connection: the engine takes none.

MODEL gives the tokenizer and the template only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from loopback import Exchange, Server, post, processor_seconds, start

CHAT = '/v1/chat/completions'
LATE = 0.020  # seconds
TEXT = ' time of the day and the way of the world' * 10  # every word is a token
RATES = (100, 150, 200, 250, 300, 350, 400, 500, 600, 800)


def chat(tokens: int, *, stream: bool = True, text: str = 'Tell me a story.') -> bytes:
    return post(CHAT, {'model': 'paced', 'messages': [{'role': 'user', 'content': text}], 'max_tokens': tokens,
                       'ignore_eos': True, 'stream': stream})


async def serve(port: int, model: str, rate: float, core: int, other: int, times: Path) -> None:
    """The server: as ``lmdeploy serve api_server`` puts it together, with another engine."""
    from lmdeploy.chat import resolve_template
    from lmdeploy.config.engine import EngineConfig
    from lmdeploy.engine.remote import ProcessClient
    from lmdeploy.frontend.frontend import AsyncFrontend
    from lmdeploy.hub.resolve import resolve
    from lmdeploy.serve.context import LoadedEngine, ServerContext
    from lmdeploy.serve.lifecycle import Watcher, bind
    from lmdeploy.serve.lifecycle import serve as run
    from lmdeploy.serve.openai.api_server import create_app
    from lmdeploy.tokenizer import Tokenizer

    os.sched_setaffinity(0, {core})
    path = resolve(model, progress=False).path
    tokenizer = Tokenizer(str(path))
    ids = tokenizer.encode(TEXT, add_bos=False)
    assert len(ids) == TEXT.count(' '), 'a word is not a token of this model'
    engine = Path(__file__).with_name('paced_engine.py')
    client = ProcessClient(EngineConfig(), path, program=(sys.executable, str(engine), f'rate={rate}', f'core={other}',
                                                          f'tokens={",".join(map(str, ids))}', f'times={times}'))
    capacity = await client.ready()
    frontend = AsyncFrontend(client, tokenizer, resolve_template(str(path), tokenizer), capacity, capacity.session_len)
    context = ServerContext(model_names=('paced',), engine=LoadedEngine(frontend))

    async def load() -> None:
        return None

    def quiet(*told: object) -> None:
        pass

    try:
        with bind('127.0.0.1', port) as sock:
            await run(create_app(context), sock, load, Watcher(quiet, quiet, quiet))
    finally:
        await client.aclose()


@dataclass(frozen=True, slots=True)
class Run:
    """Streams side by side.

    Attributes:
        late: seconds from the engine to the client, of each token but the first ones.
        engine: seconds by which the engine's ticks were late.
        tokens, events: in all streams; equal if none were joined.
        processor: seconds of the server; ``wall``: of the whole.
        truncated: streams without an end.
    """

    late: list[float]
    engine: list[float]
    tokens: int
    events: int
    processor: float
    wall: float
    truncated: int

    def share_late(self) -> float:
        return sum(late > LATE for late in self.late) / max(len(self.late), 1)

    def line(self) -> str:
        ms, engine = ([1000 * late for late in sorted(found)] or [0.0] for found in (self.late, self.engine))
        return (f'{self.tokens / self.wall:7,.0f} tokens/s; late by {ms[len(ms) // 2]:.2f} ms (median), '
                f'{ms[len(ms) * 99 // 100]:.2f} (99%), {ms[len(ms) * 999 // 1000]:.2f} (99.9%), {ms[-1]:.2f} (most); '
                f'{sum(late > LATE for late in self.late)} of {len(self.late)} later than {1000 * LATE:.0f} ms '
                f'(engine: {engine[len(engine) * 99 // 100]:.2f} (99%), {engine[-1]:.2f} (most)); '
                f'{1e6 * self.processor / self.tokens:.0f} µs of processor per token, '
                f'{100 * self.processor / self.wall:.0f}% of a core; {self.tokens / self.events:.3f} tokens per event'
                + (f'; {self.truncated} TRUNCATED' if self.truncated else ''))


def lateness(exchange: Exchange, rate: float, sent: dict[int, float]) -> list[float]:
    """Seconds by which the tokens after the first came after they were sent. The ticks are known; which is whose is not
    told, but no token comes before its own, and the earliest of all is on time."""
    words = [text.count(b' ') for text in re.findall(rb'"content":"([^"]*)"', exchange.body)]
    times = [at for at, count in zip(exchange.times, words) for _ in range(count)][1:]
    if not times:
        return []
    first = int(min(at - i / rate for i, at in enumerate(times)) * rate)
    return [at - sent[first + i] for i, at in enumerate(times) if first + i in sent]


async def streams(server: Server, count: int, tokens: int, rate: float, times: Path) -> Run:
    before, begin = processor_seconds(server.pid), time.monotonic()
    exchanges = []
    for _ in range(count):
        exchanges.append(await start(server.port, chat(tokens)))
        await asyncio.sleep(0.003)  # people do not come in the same millisecond
    await asyncio.gather(*(exchange.wait() for exchange in exchanges))
    wall, processor = time.monotonic() - begin, processor_seconds(server.pid) - before
    sent: dict[int, float] = {}
    if rate:
        await asyncio.sleep(0.1)  # for the last ticks to be written
        sent = {int(number): float(seconds) for number, seconds in map(str.split, times.read_text().splitlines())}
    late = [seconds for exchange in exchanges for seconds in lateness(exchange, rate, sent)] if rate else []
    events = sum(exchange.body.count(b'"content":"') for exchange in exchanges) - count  # the role has an empty one
    engine = [seconds - number / rate for number, seconds in sent.items()]
    truncated = sum(not exchange.complete for exchange in exchanges)
    return Run(late, engine, count * tokens, events, processor, wall, truncated)


async def first_tokens(server: Server, count: int) -> list[float]:
    """Milliseconds until the first token."""
    found = []
    for i in range(count):
        begin = time.monotonic()
        exchange = await start(server.port, chat(2, text=f'Tell me story {i}.'))
        await exchange.events(2)  # the role, and the first token
        found.append(1000 * (exchange.times[1] - begin))
        await exchange.wait()
    return sorted(found)


def tell_first(name: str, found: list[float]) -> None:
    print(f'first token, {name}: {found[len(found) // 2]:.2f} ms (median), {found[len(found) * 9 // 10]:.2f} (90%), '
          f'{found[len(found) * 99 // 100]:.2f} (99%), of {len(found)}', flush=True)


async def beside(server: Server, count: int, tokens: int, rate: float, times: Path) -> list[float]:
    """First tokens while the streams run."""
    running = asyncio.create_task(streams(server, count, tokens, rate, times))
    await asyncio.sleep(0.5)
    found = await first_tokens(server, 50)
    await running
    return found


def load_average() -> str:
    return f'{os.getloadavg()[0]:.1f}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='MODEL', nargs='?', default='smollm2:135m')
    parser.add_argument('--streams', type=int, default=64)
    parser.add_argument('--rate', type=float, default=50, help='tokens per second of each stream')
    parser.add_argument('--seconds', type=float, default=10)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--short', action='store_true', help='leave out the highest rate')
    parser.add_argument('--times', type=Path, help='of the server: where the engine tells its ticks')
    parser.add_argument('--serve', type=int, metavar='PORT', help='be the server')
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    core, other = cores[0], cores[-1]
    if args.serve is not None:
        asyncio.run(serve(args.serve, args.model, args.rate, core, other, args.times))
        return 0
    os.sched_setaffinity(0, {other})

    def server(rate: float, folder: str, times: Path) -> Server:
        return Server([__file__, args.model, '--rate', str(rate), '--serve', 'PORT', '--times', str(times)],
                      Path(folder, f'{rate}.log'))

    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder, 'times')
        with server(args.rate, folder, times) as running:
            asyncio.run(streams(running, args.streams, 50, args.rate, times))  # warm
            for _ in range(args.rounds):
                found = asyncio.run(streams(running, args.streams, int(args.rate * args.seconds), args.rate,
                                            times))
                print(f'{args.streams} streams of {args.rate:g} tokens/s (load average {load_average()}): '
                      f'{found.line()}', flush=True)
            tell_first('idle', asyncio.run(first_tokens(running, 200)))
            tell_first('beside the streams', asyncio.run(beside(running, args.streams, int(4 * args.rate), args.rate,
                                                            times)))
        if args.short:
            return 0
        for rate in RATES:
            with server(rate, folder, times) as running:
                asyncio.run(streams(running, args.streams, 50, rate, times))
                found = asyncio.run(streams(running, args.streams, int(rate * 4), rate, times))
                print(f'{args.streams} streams of {rate} tokens/s: {found.line()}', flush=True)
            if found.share_late() > 0.01:
                break
        with server(0, folder, times) as running:
            asyncio.run(streams(running, args.streams, 50, 0, times))
            found = asyncio.run(streams(running, args.streams, 2000, 0, times))
            print(f'{args.streams} streams of an engine that does not wait: {found.tokens / found.wall:,.0f} tokens/s, '
                  f'{found.tokens / found.events:.2f} tokens per event, '
                  f'{1e6 * found.processor / found.tokens:.0f} µs of processor per token')
    return 0


if __name__ == '__main__':
    sys.exit(main())
