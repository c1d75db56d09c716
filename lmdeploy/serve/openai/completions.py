"""``POST /v1/completions``: raw prompts; every prompt has ``n`` choices, numbered through all prompts."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from uuid import uuid4

from lmdeploy.frontend.frontend import RequestOutput
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.generation import Answers, Work, generate
from lmdeploy.serve.http import Request, Response, Stream, json_reply
from lmdeploy.serve.openai.answers import Completion, CompletionChoice, CompletionLogprobs
from lmdeploy.serve.openai.convert import completion_works, finite, ranked, usage_info
from lmdeploy.serve.openai.protocol import CompletionRequest
from lmdeploy.serve.sse import DONE, error_event, event
from lmdeploy.tokenizer import Tokenizer


class Completions:
    """The handler, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, body: CompletionRequest, request: Request) -> Response:
        context = self.context
        request.model = body.model
        context.check_model(body.model)
        works = completion_works(body, context.limits)
        head = Completion(id=f'cmpl-{uuid4().hex}', created=int(time.time()), model=body.model, choices=[])
        if body.stream:
            return Stream(self._stream(request, body, works, head), lambda error: error_event(error, request.id))
        return json_reply(await self._whole(request, body, works, head))

    async def _whole(self, request: Request, body: CompletionRequest, works: list[Work],
                     head: Completion) -> Completion:
        async with generate(self.context, request, works, session_id=body.session_id) as answers:
            readers = self._readers(body, works, answers)
            wholes = [reader.piece(reader.echo, with_ids=bool(body.return_token_ids)) for reader in readers]
            texts = [[whole.text] for whole in wholes]
            async for output in answers.outputs:
                whole, piece = wholes[output.choice], readers[output.choice].take(output, bool(body.return_token_ids))
                texts[output.choice].append(piece.text)
                whole.finish_reason = piece.finish_reason
                if piece.logprobs is not None and whole.logprobs is not None:
                    _extend(whole.logprobs, piece.logprobs)
                if isinstance(whole.token_ids, list) and isinstance(piece.token_ids, list):
                    whole.token_ids += piece.token_ids
            for whole, parts in zip(wholes, texts):
                whole.text = ''.join(parts)
            head.choices, head.usage = wholes, usage_info(answers.usage)
            return head

    async def _stream(self, request: Request, body: CompletionRequest, works: list[Work],
                      head: Completion) -> AsyncGenerator[bytes, None]:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        async with generate(self.context, request, works, session_id=body.session_id) as answers:
            readers = self._readers(body, works, answers)
            async for output in answers.outputs:
                reader = readers[output.choice]
                if reader.echo:
                    head.choices = [reader.piece(reader.echo)]
                    yield event(head)
                    reader.echo = ''
                piece = reader.take(output, bool(body.return_token_ids))
                if piece.text or piece.finish_reason or piece.logprobs is not None or body.return_token_ids:
                    head.choices = [piece]
                    yield event(head)
            if include_usage:
                head.choices, head.usage = [], usage_info(answers.usage)
                yield event(head)
        yield DONE

    def _readers(self, body: CompletionRequest, works: list[Work], answers: Answers) -> list[_Reader]:
        tokenizer = self.context.frontend_loaded().tokenizer
        readers: list[_Reader] = []
        for work, prepared in zip(works, answers.prepared):
            echo = ''
            if body.echo:
                echo = work.prompt.text if work.prompt.text is not None else tokenizer.decode(prepared.tokens)
            readers += [_Reader(len(readers) + i, tokenizer, body.logprobs, echo, len(echo))
                        for i in range(work.gen.n)]
        return readers


@dataclass(slots=True)
class _Reader:
    """Reads one answer."""

    index: int
    tokenizer: Tokenizer
    top: int | None
    echo: str
    offset: int  # characters of the text so far, of the tokens that were told

    def piece(self, text: str, *, with_ids: bool = False) -> CompletionChoice:
        """A choice that has only a text so far."""
        choice = CompletionChoice(index=self.index, text=text,
                                  logprobs=None if self.top is None else CompletionLogprobs())
        if with_ids:
            choice.token_ids = []
        return choice

    def take(self, output: RequestOutput, with_ids: bool) -> CompletionChoice:
        """What an output adds."""
        choice = self.piece(output.text)
        assert output.finish_reason != 'error'
        choice.finish_reason = output.finish_reason
        if with_ids:
            choice.token_ids = output.token_ids
        if choice.logprobs is not None:
            for entry in output.logprobs or ():
                if entry:
                    self._add(choice.logprobs, entry)
        return choice

    def _add(self, found: CompletionLogprobs, entry: dict[int, float]) -> None:
        token, value = next(iter(entry.items()))
        text = self._text(token)
        found.text_offset.append(self.offset)
        found.token_logprobs.append(finite(value))
        found.tokens.append(text)
        found.top_logprobs.append({self._text(other): finite(logprob)
                                   for other, logprob in reversed(ranked(entry, self.top or 0))})
        self.offset += len(text)

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode('utf-8', 'replace')


def _extend(whole: CompletionLogprobs, piece: CompletionLogprobs) -> None:
    whole.text_offset += piece.text_offset
    whole.token_logprobs += piece.token_logprobs
    whole.tokens += piece.tokens
    whole.top_logprobs += piece.top_logprobs
