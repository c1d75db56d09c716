"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from uuid import uuid4

import msgspec

from lmdeploy.frontend.frontend import RequestOutput
from lmdeploy.serve.blocks import events_of
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.generation import Answers, Usage, generate
from lmdeploy.serve.http import Request, Response, Stream, json_reply
from lmdeploy.serve.openai.answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    Finish,
    FunctionCall,
    TokenLogprob,
    ToolCallDelta,
    ToolCallInfo,
    UsageInfo,
)
from lmdeploy.serve.openai.convert import ChatPlan, chat_plan, token_logprob, usage_info
from lmdeploy.serve.openai.protocol import ChatRequest
from lmdeploy.serve.parsers import AnswerParser, CallArguments, CallStart, Content, Event, Reasoning, collect
from lmdeploy.serve.sse import DONE, error_event, event
from lmdeploy.tokenizer import Tokenizer


class Chat:
    """The handler, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, body: ChatRequest, request: Request) -> Response:
        context = self.context
        request.model = body.model
        context.check_model(body.model)
        plan = chat_plan(body, context.limits, context.parser_names(context.frontend()))
        head = _Head(f'chatcmpl-{uuid4().hex}', int(time.time()), body.model)
        if body.stream:
            return Stream(self._stream(request, body, plan, head), lambda error: error_event(error, request.id))
        return json_reply(await self._whole(request, body, plan, head))

    async def _whole(self, request: Request, body: ChatRequest, plan: ChatPlan, head: _Head) -> ChatCompletion:
        async with generate(self.context, request, [plan.work], session_id=body.session_id) as answers:
            readers = self._readers(plan, answers)
            async for output in answers.outputs:
                readers[output.choice].take(output, answers.usage)
            completion = ChatCompletion(id=head.id, created=head.created, model=head.model,
                                        choices=[reader.choice(body) for reader in readers],
                                        usage=usage_info(answers.usage))
            if body.return_token_ids:
                completion.prompt_token_ids = answers.prepared[0].tokens
            return completion

    async def _stream(self, request: Request, body: ChatRequest, plan: ChatPlan,
                      head: _Head) -> AsyncGenerator[bytes, None]:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        async with generate(self.context, request, [plan.work], session_id=body.session_id) as answers:
            readers = self._readers(plan, answers)
            async for output in answers.outputs:
                reader = readers[output.choice]
                if not reader.begun:
                    reader.begun = True
                    first = head.chunk(ChunkChoice(index=output.choice, delta=Delta(role='assistant', content='')))
                    if body.return_token_ids:
                        first.prompt_token_ids = answers.prepared[0].tokens
                    yield event(first)
                events = reader.take(output, answers.usage)
                for choice in reader.chunks(events, output, bool(body.return_token_ids)):
                    yield event(head.chunk(choice))
            if include_usage:
                yield event(head.chunk(usage=usage_info(answers.usage)))
        yield DONE

    def _readers(self, plan: ChatPlan, answers: Answers) -> list[_Reader]:
        tokenizer = self.context.frontend_loaded().tokenizer
        prepared, gen = answers.prepared[0], plan.work.gen
        return [_Reader(i, plan.parser(tokenizer, prepared.tokens), tokenizer, gen.logprobs)
                for i in range(gen.n)]


@dataclass(frozen=True, slots=True)
class _Head:
    """What all chunks of a response begin with."""

    id: str
    created: int
    model: str

    def chunk(self, choice: ChunkChoice | None = None, usage: UsageInfo | msgspec.UnsetType = msgspec.UNSET
              ) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, usage=usage,
                         choices=[] if choice is None else [choice])


@dataclass(slots=True)
class _Reader:
    """Reads one answer: text to reasoning, content and calls, tokens to log-probabilities.

    The events of a streamed answer are those of a whole one, and what a client puts together from its chunks is the
    whole message.
    """

    index: int
    parser: AnswerParser | None
    tokenizer: Tokenizer
    top: int | None  # alternatives per token; None: no log-probabilities
    begun: bool = False
    events: list[Event] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, output: RequestOutput, usage: Usage) -> list[Event]:
        """What an output tells."""
        events = events_of(output, self.parser, usage)
        self.events += events
        self.token_ids += output.token_ids
        if self.top is not None:
            self.logprobs += [token_logprob(self.tokenizer, entry, self.top)
                              for entry in output.logprobs or () if entry]
        if output.finish_reason is not None:
            calls = self.parser is not None and self.parser.calls
            reason = output.finish_reason
            assert reason != 'error'
            self.finish = 'tool_calls' if calls and reason == 'stop' else reason
        return events

    def chunks(self, events: Iterable[Event], output: RequestOutput, with_ids: bool) -> list[ChunkChoice]:
        """The pieces of a stream that an output makes; the first carries its log-probabilities and tokens."""
        deltas = [delta for delta in map(_delta, events) if delta is not None]
        found = [ChunkChoice(index=self.index, delta=delta) for delta in deltas]
        if self.finish is not None:
            found.append(ChunkChoice(index=self.index, delta=Delta(), finish_reason=self.finish))
        if found:
            if self.logprobs:
                found[0].logprobs = ChatLogprobs(self.logprobs)
                self.logprobs = []
            if with_ids:
                found[0].token_ids = self.token_ids
                self.token_ids = []
            self.events.clear()
        return found

    def choice(self, body: ChatRequest) -> ChatChoice:
        """The whole answer."""
        answer = collect(self.events)
        calls = [ToolCallInfo(id=call.id, function=FunctionCall(call.name, call.arguments)) for call in answer.calls]
        content = answer.content if answer.content is not None or calls else ''
        assert self.finish is not None
        choice = ChatChoice(
            index=self.index, finish_reason=self.finish,
            message=ChatMessage(content=content, reasoning_content=answer.reasoning, tool_calls=calls or None),
            logprobs=None if self.top is None else ChatLogprobs(self.logprobs))
        if body.return_token_ids:
            choice.token_ids = self.token_ids
        return choice


def _delta(event: Event) -> Delta | None:
    """What an event adds to a message."""
    if isinstance(event, Content):
        return Delta(content=event.text)
    if isinstance(event, Reasoning):
        return Delta(reasoning_content=event.text)
    if isinstance(event, CallStart):
        return Delta(tool_calls=[ToolCallDelta(index=event.index, id=event.id, type='function',
                                               function=FunctionCall(event.name, event.arguments))])
    if isinstance(event, CallArguments):
        return Delta(tool_calls=[ToolCallDelta(index=event.index, function=FunctionCall(arguments=event.text))])
    return None
