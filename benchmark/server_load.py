"""The server under load, and when clients, the engine or the server itself are ended: nothing may be lost or kept.

    python benchmark/server_load.py MODEL [--requests 2000] [--clients 64]

Starts ``lmdeploy serve api_server MODEL`` on a loopback port and plays four parts:

* load: a third of the requests are streams, a tenth are left in the middle of one. No request may be lost, no status of
  class 5xx, counters must add up at every scrape, all blocks be free at the end, memory stay flat (that of the engine,
  apart from the kernels that oneDNN keeps);
* a client process with 100 open streams is killed: all its blocks must be free within a second;
* the engine's process is killed: pending requests must get an error within two seconds, ``/health`` must say so, and
  the next request after the restart must succeed;
* SIGTERM under 50 streams: each must end with its finish reason and ``[DONE]``, and the server with status 0.

The exit status is 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from loopback import Memory, Server, post, start

CHAT = '/v1/chat/completions'
SCRAPE_SECONDS = 0.2
WARM_REQUESTS = 1000  # a quarter of fewer does not show yet what the process needs for good
KERNELS_MIB = 1200  # oneDNN keeps the last 1,024 kernels that it has made, one for each size of step and matrix
PATIENCE = 60.0  # seconds after which a request counts as lost
WORDS = 'time day year way thing world life hand part child eye place work week case point company number'.split()


def chat(model: str, tokens: int, *, stream: bool, words: int = 10, seed: int = 0) -> bytes:
    """A request for an answer of exactly ``tokens`` tokens."""
    text = ' '.join(random.Random(seed).choices(WORDS, k=words))
    return post(CHAT, {'model': model, 'messages': [{'role': 'user', 'content': text}], 'max_tokens': tokens,
                       'ignore_eos': True, 'stream': stream})


@dataclass
class Report:
    """Figures, and the promises that did not hold."""

    broken: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        print(text, flush=True)

    def check(self, holds: bool, promise: str) -> None:
        if not holds:
            self.broken.append(promise)
            self.tell(f'  BROKEN: {promise}')


@dataclass
class Outcomes:
    """What became of the requests of the load."""

    whole: int = 0
    streamed: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def one(port: int, model: str, i: int, outcomes: Outcomes) -> None:
    """Request number ``i``: its kind and sizes follow from the number."""
    tokens = 4 + i * 7 % 28
    leaves, streams = i % 10 == 9, i % 3 == 0
    exchange = await start(port, chat(model, 40 if leaves else tokens, stream=streams or leaves, words=1 + i % 60,
                                      seed=i))
    try:
        if leaves:
            await asyncio.wait_for(exchange.events(2 + i % 5), PATIENCE)
            exchange.leave()
            outcomes.left += 1
            return
        await asyncio.wait_for(exchange.wait(), PATIENCE)
    except asyncio.TimeoutError:
        outcomes.lost.append(f'{i}: no answer')
        return
    outcomes.seconds.append(time.monotonic() - exchange.sent)
    if exchange.status != 200 or not exchange.ended:
        outcomes.lost.append(f'{i}: status {exchange.status}, {bytes(exchange.body[-200:])!r}')
    elif streams:
        outcomes.streamed += 1
        if not exchange.complete:
            outcomes.lost.append(f'{i}: a stream without an end')
    else:
        outcomes.whole += 1
        if json.loads(exchange.body)['usage']['completion_tokens'] != tokens:
            outcomes.lost.append(f'{i}: not {tokens} tokens')


async def load(server: Server, requests: int, clients: int, report: Report) -> None:
    model, outcomes, memory, before = server.model(), Outcomes(), [server.memory()], server.metrics()
    jobs, scrapes, over = iter(range(requests)), 0, asyncio.Event()

    async def client() -> None:
        for i in jobs:
            if i == requests // 4:
                memory.append(server.memory())
            await one(server.port, model, i, outcomes)

    async def watch() -> None:
        nonlocal scrapes
        while not over.is_set():
            metrics = await asyncio.to_thread(server.metrics)
            scrapes += 1
            report.check(metrics.adds_up, f'counters add up: {metrics}')
            await asyncio.sleep(SCRAPE_SECONDS)

    watcher = asyncio.create_task(watch())
    begin = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.monotonic() - begin
    over.set()
    await watcher
    idle = await settled(server, 5.0)
    metrics = server.metrics()
    errors = metrics.server_errors - before.server_errors  # before: of /ready, while the model was loading
    memory.append(server.memory())
    times = sorted(outcomes.seconds)
    report.tell(f'load: {requests} requests of {clients} clients in {seconds:.1f} s: {outcomes.whole} whole, '
                f'{outcomes.streamed} streamed, {outcomes.left} left; {len(outcomes.lost)} lost, '
                f'{errors} of class 5xx')
    report.tell(f'  time of an answer: median {times[len(times) // 2]:.2f} s, '
                f'99% {times[len(times) * 99 // 100]:.2f} s')
    report.tell(f'  counters add up at all {scrapes} scrapes: accepted {metrics.accepted} = finished '
                f'{metrics.finished} + failed {metrics.failed} + cancelled {metrics.cancelled} + in flight '
                f'{metrics.in_flight}')
    report.tell(f'  all blocks free {idle:.2f} s after the last answer')
    _tell_memory(memory, report, check=requests >= WARM_REQUESTS)
    report.check(not outcomes.lost, f'no request is lost: {outcomes.lost[:5]}')
    report.check(outcomes.whole + outcomes.streamed + outcomes.left == requests, 'every request is accounted for')
    report.check(errors == 0, f'no status of class 5xx: {metrics.statuses}')
    report.check(metrics.failed == 0 and metrics.finished >= outcomes.whole + outcomes.streamed, f'counts: {metrics}')
    report.check(idle < 5.0 and metrics.idle, f'all blocks are free at the end: {metrics}')


def _tell_memory(memory: list[Memory], report: Report, *, check: bool) -> None:
    first, quarter, last = memory
    report.tell(f'  resident MiB of server and engine: {first.server:.0f} and {first.engine:.0f} before, '
                f'{quarter.server:.0f} and {quarter.engine:.0f} after a quarter, '
                f'{last.server:.0f} and {last.engine:.0f} at the end')
    server, engine = last.server - quarter.server, last.engine - first.engine
    report.check(not check or server < 32, f'memory of the server is flat: {server:.0f} MiB more')
    report.check(engine < KERNELS_MIB, f'memory of the engine is flat, its kernels apart: {engine:.0f} MiB more')


async def settled(server: Server, most: float) -> float:
    """Seconds until nothing runs and no block is held."""
    begin = time.monotonic()
    while time.monotonic() - begin < most:
        if server.metrics().idle:
            return time.monotonic() - begin
        await asyncio.sleep(0.01)
    return most


async def hold(port: int, streams: int, tokens: int, model: str) -> None:
    """The client that is killed: opens streams, says so, and reads them."""
    exchanges = await asyncio.gather(*(start(port, chat(model, tokens, stream=True, seed=i)) for i in range(streams)))
    await exchanges[0].events(2)
    print('open', flush=True)
    await asyncio.gather(*(exchange.wait() for exchange in exchanges))


async def client_killed(server: Server, streams: int, tokens: int, batch: int, report: Report) -> None:
    command = [sys.executable, __file__, server.model(), '--hold', str(server.port), '--streams', str(streams),
               '--tokens', str(tokens)]
    before = server.metrics()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        at_once = min(streams, batch)
        while (held := server.metrics()).running < at_once and held.finished == before.finished:
            await asyncio.sleep(0.01)
        client.kill()
        begin = time.monotonic()
        client.wait()
    idle = await settled(server, 10.0)
    seconds = time.monotonic() - begin
    after = server.metrics()
    report.tell(f'a killed client with {held.in_flight} open streams ({held.running} running, '
                f'{100 * held.used_blocks:.0f}% of the blocks): all free after {seconds:.2f} s')
    report.check(held.in_flight == streams, f'{streams} streams are open, not {held.in_flight}')
    report.check(after.cancelled - before.cancelled == streams, f'all are cancelled: {after}')
    report.check(idle < 10 and seconds < 1.0, f'all blocks are free within a second: {seconds:.2f} s')


async def engine_killed(server: Server, pending: int, tokens: int, report: Report) -> None:
    model = server.model()
    exchanges = [await start(server.port, chat(model, tokens, stream=i % 2 == 0, seed=i)) for i in range(pending)]
    await exchanges[0].events(2)
    begin = time.monotonic()
    os.kill(server.engine, signal.SIGKILL)
    health, told = await _told(server, begin)
    await asyncio.wait_for(asyncio.gather(*(exchange.wait() for exchange in exchanges)), PATIENCE)
    seconds = time.monotonic() - begin
    errors = {(exchange.status, exchange.error) for exchange in exchanges}
    while not await asyncio.to_thread(server.ready):
        assert time.monotonic() < begin + PATIENCE, 'the engine does not come back'
        await asyncio.sleep(0.02)
    again = time.monotonic() - begin
    after = await start(server.port, chat(model, 5, stream=False))
    await after.wait()
    idle = await settled(server, 5.0)
    report.tell(f'a killed engine: {pending} pending requests have their error after {seconds:.2f} s {sorted(errors)}, '
                f'/health tells after {told:.2f} s: {health}')
    report.tell(f'  ready again after {again:.1f} s, the next request: {after.status}')
    report.check(all(exchange.error for exchange in exchanges), f'every pending request gets an error: {errors}')
    report.check(not any(exchange.complete for exchange in exchanges), 'no broken stream looks complete')
    report.check(seconds < 2.0, f'errors come within two seconds: {seconds:.2f} s')
    report.check('SIGKILL' in health and told < 2.0, f'/health says so within two seconds: {health}')
    report.check(after.status == 200, f'the next request succeeds: {after.status}')
    report.check(idle < 5.0, 'nothing is left behind')


async def _told(server: Server, begin: float) -> tuple[str, float]:
    """The first answer of ``/health`` that names the cause, and the seconds until it came."""
    while time.monotonic() < begin + 10:
        status, body = await asyncio.to_thread(server.get, '/health')
        if status == 503 and b'killed' in body:
            return f'{status} {body.decode()[:200]}', time.monotonic() - begin
        await asyncio.sleep(0.01)
    return 'nothing', time.monotonic() - begin


async def drained(server: Server, streams: int, tokens: int, report: Report) -> None:
    model = server.model()
    exchanges = await asyncio.gather(*(start(server.port, chat(model, tokens, stream=True, seed=i))
                                       for i in range(streams)))
    await asyncio.gather(*(exchange.events(1) for exchange in exchanges))
    begin = time.monotonic()
    open_streams = sum(not exchange.ended for exchange in exchanges)
    server.signal(signal.SIGTERM)
    await asyncio.wait_for(asyncio.gather(*(exchange.wait() for exchange in exchanges)), PATIENCE)
    finished = time.monotonic() - begin
    status = await asyncio.to_thread(server.process.wait, PATIENCE)
    ended = time.monotonic() - begin
    truncated = sum(not exchange.complete for exchange in exchanges)
    report.tell(f'SIGTERM under {open_streams} open streams: {truncated} truncated, the last one complete after '
                f'{finished:.1f} s, exit status {status} after {ended:.1f} s')
    report.check(open_streams == streams, f'{streams} streams are open, not {open_streams}')
    report.check(truncated == 0, f'no stream is truncated: {truncated} are')
    report.check(status == 0, f'exit status 0, not {status}')


async def play(server: Server, args: argparse.Namespace, report: Report) -> None:
    await load(server, args.requests, args.clients, report)
    await client_killed(server, args.streams, args.tokens, args.batch, report)
    await engine_killed(server, 20, args.tokens, report)
    await drained(server, args.streams // 2, args.tokens, report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='MODEL')
    parser.add_argument('--requests', type=int, default=2000)
    parser.add_argument('--clients', type=int, default=64)
    parser.add_argument('--streams', type=int, default=100, help='of the killed client; half as many at SIGTERM')
    parser.add_argument('--tokens', type=int, default=400, help='of each of these streams')
    parser.add_argument('--session-len', type=int, default=1024)
    parser.add_argument('--batch', type=int, default=128, help='answers that the engine works on at once')
    parser.add_argument('--hold', type=int, metavar='PORT', help='be the client that is killed')
    args = parser.parse_args()
    if args.hold is not None:
        asyncio.run(hold(args.hold, args.streams, args.tokens, args.model))
        return 0
    command = ['-m', 'lmdeploy', 'serve', 'api_server', args.model, '--server-port', 'PORT', '--session-len',
               str(args.session_len), '--max-batch-size', str(args.batch)]
    report = Report()
    with tempfile.TemporaryDirectory() as folder, Server(command, Path(folder, 'server.log')) as server:
        try:
            asyncio.run(play(server, args, report))
        finally:
            if report.broken:
                report.tell(server.log.read_text(errors='replace')[-4000:])
    return 1 if report.broken else 0


if __name__ == '__main__':
    sys.exit(main())
