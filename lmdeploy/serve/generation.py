"""From checked work to numbered answers: the one way of all routes to the engine.

Admission, preparation off the event loop, the engine, counters, and the end in every case: what a route does is to turn
a body into :class:`Work`, and outputs into its own form.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lmdeploy.frontend.frontend import AsyncFrontend, Prepared, RequestOutput, merge
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.context import Running, ServerContext
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Request
from lmdeploy.serve.ledger import Outcome
from lmdeploy.serve.metrics import Clock


@dataclass(frozen=True, slots=True)
class Work:
    """One prompt and how to answer it."""

    prompt: Prompt
    gen: GenerationConfig
    do_preprocess: bool = True
    sequence_start: bool = True
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    pooled: bool = False


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far."""

    prompt: int = 0
    generated: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """The running answers of a request.

    Attributes:
        prepared: the prompts in tokens.
        outputs: what is new in the answers, in the order in which it comes; ``choice`` counts through all prompts. An
            answer that fails is raised.
        usage: grows as the outputs come.
    """

    prepared: list[Prepared]
    outputs: AsyncGenerator[RequestOutput, None]
    usage: Usage


@asynccontextmanager
async def generate(context: ServerContext, request: Request, works: Sequence[Work], *,
                   session_id: int | None = None) -> AsyncIterator[Answers]:
    """Run the works of one request; leaving the block, in whichever way, ends what still runs.

    Args:
        session_id: the client's own name for the request, one at a time; None or -1: it has none.

    Raises:
        HttpError: the engine is not there, the queue is full, a limit is exceeded, the session is busy.
        LmdeployError: a prompt or a parameter cannot be served.
    """
    frontend = context.frontend()
    answers = sum(work.gen.n for work in works)
    _check_size(context, works, answers)
    session_id = -1 if session_id is None else session_id
    if session_id >= 0 and any(r.session_id == session_id and r.caller == request.caller.id for r in context.running):
        raise HttpError('LMD-524', session_id=session_id, param='session_id')
    names = [frontend.new_name() for _ in works]
    entry = Running(request.caller.id, request.id, session_id, partial(_abort, frontend, names, works))
    context.running.append(entry)
    try:
        async with context.admission.enter(request.caller, answers):
            prepared = await _prepare(context, frontend, works)
            async with _counted(context, request) as count:
                usage = Usage(prompt=sum(len(p.tokens) for p in prepared))
                request.prompt_tokens = usage.prompt
                streams = [await _submit(context, frontend, request, *pair) for pair in zip(prepared, names)]
                outputs = _number(context, request, streams, works, usage, count)
                async with aclosing(outputs):
                    yield Answers(prepared, outputs, usage)
                context.admission.spend(request.caller, usage.prompt + usage.generated)
    finally:
        context.running.remove(entry)


@dataclass(slots=True)
class _Count:
    """Answers of a request by how they ended."""

    ended: int = 0
    aborted: int = 0


@asynccontextmanager
async def _counted(context: ServerContext, request: Request) -> AsyncIterator[_Count]:
    """Count a request from its acceptance to its one end."""
    metrics, count = context.metrics, _Count()
    outcome: Outcome = 'cancelled'
    metrics.accept()
    try:
        yield count
        outcome = 'cancelled' if count.aborted else 'finished'
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException:
        outcome = 'failed'
        raise
    finally:
        request.outcome = outcome
        metrics.end(outcome)


def _check_size(context: ServerContext, works: Sequence[Work], answers: int) -> None:
    limits = context.limits
    limits.check('answers', answers, 'n')
    asked = max((work.gen.max_new_tokens or 0 for work in works), default=0)
    limits.check('tokens', answers * asked, 'max_tokens')


async def _prepare(context: ServerContext, frontend: AsyncFrontend, works: Sequence[Work]) -> list[Prepared]:
    """Pictures; templates and tokens, in a thread."""
    works = [replace(work, prompt=await context.load_pictures(frontend, work.prompt)) for work in works]

    def prepare() -> list[Prepared]:
        return [frontend.prepare(work.prompt, work.gen, do_preprocess=work.do_preprocess,
                                 sequence_start=work.sequence_start, tools=work.tools,
                                 enable_thinking=work.enable_thinking, chat_template_kwargs=work.chat_template_kwargs,
                                 pooled=work.pooled)
                for work in works]

    return await asyncio.get_running_loop().run_in_executor(context.pool, prepare)


async def _submit(context: ServerContext, frontend: AsyncFrontend, request: Request, prepared: Prepared,
                  name: str) -> AsyncGenerator[RequestOutput, None]:
    shared = context.share_prefix_cache
    caller = request.caller
    return await frontend.submit(prepared, name=name, salt=b'' if shared else caller.salt,
                                 tenant='' if shared or not caller.keyed else caller.id)


async def _number(context: ServerContext, request: Request, streams: list[AsyncGenerator[RequestOutput, None]],
                  works: Sequence[Work], usage: Usage, count: _Count) -> AsyncGenerator[RequestOutput, None]:
    """Count the choices through all works, and tell the metrics."""
    first = [sum(work.gen.n for work in works[:i]) for i in range(len(works))]
    numbered = [_shift(stream, first[i]) for i, stream in enumerate(streams)]
    merged = numbered[0] if len(numbered) == 1 else merge(numbered)
    total = sum(work.gen.n for work in works)
    clocks = [Clock(context.metrics, request.started) for _ in range(total)]
    generated = [0] * total
    for clock in clocks:
        clock.submit()
    async with aclosing(merged):
        async for output in merged:
            if output.error is not None:
                raise output.error
            choice = output.choice
            if output.token_ids:
                clocks[choice].token()
            usage.generated += output.generated_len - generated[choice]
            generated[choice] = output.generated_len
            request.output_tokens = usage.generated
            usage.cached = max(usage.cached, output.cached_tokens)
            if output.finish_reason is not None:
                count.ended += 1
                count.aborted += output.finish_reason == 'abort'
                clocks[choice].end(output.finish_reason, output.input_len, output.generated_len, output.cached_tokens)
            yield output


async def _shift(stream: AsyncGenerator[RequestOutput, None], by: int) -> AsyncGenerator[RequestOutput, None]:
    async with aclosing(stream):
        async for output in stream:
            output.choice += by
            yield output


def _abort(frontend: AsyncFrontend, names: list[str], works: Sequence[Work]) -> None:
    for name, work in zip(names, works):
        frontend.abort(name, work.gen.n)
