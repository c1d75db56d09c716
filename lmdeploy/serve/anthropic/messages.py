"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from uuid import uuid4

from starlette.responses import Response

from lmdeploy.errors import RequestError
from lmdeploy.serve.anthropic.convert import count_plan, message_plan
from lmdeploy.serve.anthropic.events import (
    MessageAnswer,
    MessageUsage,
    StopReason,
    TokenCount,
    content_of,
    end_event,
    error_event,
    start_event,
    step_event,
    usage_of,
)
from lmdeploy.serve.anthropic.protocol import CountTokensRequest, MessagesRequest
from lmdeploy.serve.blocks import BlockReader, Blocks, Kind
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.generation import Answers, generate
from lmdeploy.serve.http import Request, Stream, json_reply
from lmdeploy.serve.openai.convert import ChatPlan


class Messages:
    """The handler, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, body: MessagesRequest, request: Request) -> Response:
        context = self.context
        request.model = body.model
        context.check_model(body.model)
        plan = message_plan(body, context.limits, context.parser_names(context.frontend()))
        if body.stream:
            return Stream(self._stream(request, body, plan), lambda error: error_event(error, request.id))
        return json_reply(await self._whole(request, body, plan))

    async def _whole(self, request: Request, body: MessagesRequest, plan: ChatPlan) -> MessageAnswer:
        async with generate(self.context, request, [plan.work]) as answers:
            reader = self._reader(plan, answers)
            async for output in answers.outputs:
                reader.take(output, answers.usage)
            message = _head(body, answers)
            message.content, message.usage = content_of(reader.blocks.all), usage_of(answers.usage)
            message.stop_reason, message.stop_sequence = self._stop(body, reader, answers)
            return message

    async def _stream(self, request: Request, body: MessagesRequest, plan: ChatPlan) -> AsyncGenerator[bytes, None]:
        async with generate(self.context, request, [plan.work]) as answers:
            reader = self._reader(plan, answers)
            begun = False
            async for output in answers.outputs:
                steps = reader.take(output, answers.usage)
                if not begun:
                    begun = True
                    yield start_event(_head(body, answers))
                if steps:
                    yield b''.join(map(step_event, steps))
            yield end_event(*self._stop(body, reader, answers), answers.usage)

    def _reader(self, plan: ChatPlan, answers: Answers) -> BlockReader:
        parser = plan.parser(self.context.frontend_loaded().tokenizer, answers.prepared[0].tokens)
        return BlockReader(parser, Blocks(_new_id))

    def _stop(self, body: MessagesRequest, reader: BlockReader, answers: Answers) -> tuple[StopReason, str | None]:
        """Why the answer ended, and the stop sequence that ended it."""
        usage = answers.usage
        if reader.finish == 'abort':
            return 'abort', None
        if reader.finish == 'length':
            full = usage.prompt + usage.generated >= self.context.frontend_loaded().capacity.session_len
            return 'model_context_window_exceeded' if full else 'max_tokens', None
        if reader.stop_text is not None and reader.stop_text in (body.stop_sequences or ()):
            return 'stop_sequence', reader.stop_text
        return 'tool_use' if reader.blocks.calls else 'end_turn', None


class CountTokens:
    """The handler of ``count_tokens``: exactly the ``input_tokens`` of the message. No engine, no queue."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, body: CountTokensRequest, request: Request) -> Response:
        context = self.context
        request.model = body.model
        context.check_model(body.model)
        frontend = context.frontend()
        work = count_plan(body, context.limits, context.parser_names(frontend)).work
        prompt = await context.load_pictures(frontend, work.prompt)
        prepare = partial(frontend.prepare, prompt, work.gen, tools=work.tools,
                          enable_thinking=work.enable_thinking, chat_template_kwargs=work.chat_template_kwargs)
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(context.pool, prepare)
        except RequestError as error:
            if error.code != 'LMD-301':
                raise
            return json_reply(TokenCount(int(str(error.params['prompt_len']))))  # too long to answer, not to count
        return json_reply(TokenCount(len(prepared.tokens)))


def _new_id(kind: Kind) -> str:
    """Only calls have ids here."""
    return f'toolu_{uuid4().hex}' if kind == 'call' else ''


def _head(body: MessagesRequest, answers: Answers) -> MessageAnswer:
    """A message that is about to begin."""
    return MessageAnswer(id=f'msg_{uuid4().hex}', model=body.model, content=[],
                         usage=MessageUsage(answers.usage.prompt, 0))
