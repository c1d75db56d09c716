"""``bench serve``: requests that arrive at a running server as a Poisson process, and how long their clients wait.

Any server will do that has OpenAI's ``/v1/completions`` with prompts of token ids, streams, ``ignore_eos`` and
``stream_options``. Arrivals do not wait for answers: a server that is too slow gets a queue, as in life.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lmdeploy.bench.report import Environment, Spread
from lmdeploy.bench.stream import Answer, ask
from lmdeploy.bench.workload import Workload, arrivals
from lmdeploy.errors import RequestError
from lmdeploy.serve.fetch import Address
from lmdeploy.serve.listener import RESERVE, descriptors

PATH = '/v1/completions'


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked.

    Attributes:
        vocab_size: prompts are of random ids below it.
        timeout: seconds after which a request counts as failed.
    """

    url: str
    model: str
    vocab_size: int
    api_key: str | None = None
    timeout: float = 600.0


@dataclass(slots=True)
class OnlineReport:
    """What the clients of a server saw. Times in milliseconds; rates per second of the whole run.

    Attributes:
        request_rate: of the arrivals, per second; infinite: all at once.
        concurrency: requests at a time, at most; 0: any number.
        first_token: from sending a request; per_token: a request's mean time between its tokens after the first;
            between_events: the times between a stream's events with text; end_to_end: to the last byte.
        seconds: from the first request to the last answer.
        output_tokens: as the server counted them; where it did not, one per event.
        errors: how many requests failed, by reason. They are in no time and no rate.
    """

    benchmark: str
    environment: Environment
    url: str
    model: str
    workload: str
    request_rate: float
    concurrency: int
    seed: int
    requests: int
    succeeded: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    first_token: Spread | None
    per_token: Spread | None
    between_events: Spread | None
    end_to_end: Spread | None


async def serve(target: Target, load: Workload, *, rate: float, seed: int, concurrency: int = 0,
                warmup: int = 1) -> OnlineReport:
    """Play a workload against a server.

    Raises:
        RequestError: LMD-592, no request succeeded.
        ConfigError: LMD-581, the address is none.
    """
    address = Address.parse(target.url)
    bodies = [{'model': target.model, 'prompt': request.tokens, 'max_tokens': request.params.max_new_tokens,
               'temperature': 0.0, 'ignore_eos': True, 'stream': True, 'stream_options': {'include_usage': True}}
              for request in load.requests(target.vocab_size, seed=seed)]
    for body in bodies[:warmup]:
        await ask(address, PATH, {**body, 'max_tokens': 2}, target.api_key, target.timeout)
    open_at_once = concurrency or len(bodies)
    descriptors(open_at_once + RESERVE)
    free = asyncio.Semaphore(open_at_once)
    begin = time.perf_counter()

    async def one(body: dict, due: float) -> Answer:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        async with free:
            return await ask(address, PATH, body, target.api_key, target.timeout)

    due = arrivals(len(bodies), rate, seed=seed)
    answers = await asyncio.gather(*(one(body, at) for body, at in zip(bodies, due)))
    return _report(target, load, answers, rate, seed, concurrency)


def _report(target: Target, load: Workload, answers: Sequence[Answer], rate: float, seed: int,
            concurrency: int) -> OnlineReport:
    good = [answer for answer in answers if not answer.error and answer.times]
    errors = Counter(answer.error or 'an answer without text' for answer in answers
                     if answer.error or not answer.times)
    if not good:
        raise RequestError('LMD-592', requests=len(answers), reason=next(iter(errors)))
    seconds = max(answer.ended for answer in good) - min(answer.sent for answer in answers)
    counts = [answer.tokens or len(answer.times) for answer in good]
    return OnlineReport(
        benchmark='serve', environment=Environment(), url=target.url, model=target.model, workload=load.name,
        request_rate=rate, concurrency=concurrency, seed=seed, requests=len(answers), succeeded=len(good),
        errors=dict(errors), seconds=seconds, prompt_tokens=sum(answer.prompt_tokens for answer in good),
        output_tokens=sum(counts), requests_per_second=len(good) / seconds,
        output_tokens_per_second=sum(counts) / seconds,
        first_token=Spread.of([answer.times[0] - answer.sent for answer in good]),
        per_token=Spread.of([(answer.times[-1] - answer.times[0]) / (count - 1)
                             for answer, count in zip(good, counts) if count > 1]),
        between_events=Spread.of([b - a for answer in good for a, b in zip(answer.times, answer.times[1:])]),
        end_to_end=Spread.of([answer.ended - answer.sent for answer in good]))
