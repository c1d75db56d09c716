"""``/v1/responses``: answers that the server may remember, and what goes on from them.

The answers of a key are remembered in memory until they are deleted, until there are too many of them, or until the
server ends (:mod:`lmdeploy.serve.openai.responses_store`); ``store: false`` leaves no trace.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

import msgspec
from starlette.responses import Response

from lmdeploy.serve.blocks import BlockReader, Blocks, Kind
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.generation import Answers, Usage, generate
from lmdeploy.serve.http import Request, Stream, json_reply
from lmdeploy.serve.openai.convert import ChatPlan
from lmdeploy.serve.openai.responses_convert import conversation, response_plan
from lmdeploy.serve.openai.responses_events import (
    ResponseDeleted,
    ResponseEvents,
    ResponseObject,
    finish_response,
    new_response,
)
from lmdeploy.serve.openai.responses_protocol import ResponsesRequest
from lmdeploy.serve.openai.responses_store import ResponseStore
from lmdeploy.serve.turns import Turns

PREFIXES = {'text': 'msg', 'reasoning': 'rs', 'call': 'call'}


class Responses:
    """The handlers, over a server's context: :meth:`create`, :meth:`get`, :meth:`delete`."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self.store = ResponseStore(context.limits)

    async def create(self, body: ResponsesRequest, request: Request) -> Response:
        """``POST /v1/responses``."""
        context = self.context
        request.model = body.model
        context.check_model(body.model)
        parsers = context.parser_names(context.frontend())
        messages = conversation(body, self._before(body, request.caller.id), context.limits)
        plan = response_plan(body, messages, context.limits, parsers)
        response = new_response(f'resp_{uuid4().hex}', body)
        if body.stream:
            events = ResponseEvents(response)
            return Stream(self._stream(request, plan, messages, events), lambda error: events.fail(error, request.id))
        return json_reply(await self._whole(request, plan, messages, response))

    async def get(self, response_id: str, request: Request) -> Response:
        """``GET /v1/responses/{response_id}``."""
        if request.query_params:
            raise HttpError('LMD-513', param=next(iter(request.query_params))[:100], reason='an answer is given whole')
        stored = self.store.get(request.caller.id, response_id)
        if stored is None:
            raise HttpError('LMD-534', response_id=response_id[:100], param='response_id')
        return Response(stored.body, media_type='application/json')

    async def delete(self, response_id: str, request: Request) -> Response:
        """``DELETE /v1/responses/{response_id}``. Answers that go on from it stay."""
        if not self.store.delete(request.caller.id, response_id):
            raise HttpError('LMD-534', response_id=response_id[:100], param='response_id')
        return json_reply(ResponseDeleted(response_id))

    def _before(self, body: ResponsesRequest, caller: str) -> tuple[dict[str, Any], ...]:
        """What was said until the end of the response that this one goes on from."""
        if body.previous_response_id is None:
            return ()
        stored = self.store.get(caller, body.previous_response_id)
        if stored is None:
            raise HttpError('LMD-534', response_id=body.previous_response_id[:100], param='previous_response_id')
        return stored.messages

    async def _whole(self, request: Request, plan: ChatPlan, messages: list[dict[str, Any]],
                     response: ResponseObject) -> ResponseObject:
        async with generate(self.context, request, [plan.work]) as answers:
            reader = self._reader(plan, answers)
            async for output in answers.outputs:
                reader.take(output, answers.usage)
            self._finish(request, response, reader, messages, answers.usage)
            return response

    async def _stream(self, request: Request, plan: ChatPlan, messages: list[dict[str, Any]],
                      events: ResponseEvents) -> AsyncGenerator[bytes, None]:
        async with generate(self.context, request, [plan.work]) as answers:
            reader = self._reader(plan, answers)
            begun = False
            async for output in answers.outputs:
                steps = reader.take(output, answers.usage)
                if not begun:
                    begun = True
                    yield events.begin()
                if steps:
                    yield b''.join(map(events.step, steps))
            self._finish(request, events.response, reader, messages, answers.usage)
            yield events.end()

    def _reader(self, plan: ChatPlan, answers: Answers) -> BlockReader:
        parser = plan.parser(self.context.frontend_loaded().tokenizer, answers.prepared[0].tokens)
        return BlockReader(parser, Blocks(_new_id))

    def _finish(self, request: Request, response: ResponseObject, reader: BlockReader, messages: list[dict[str, Any]],
                usage: Usage) -> None:
        """The answer has ended: describe it, and remember it before its client learns of the end."""
        assert reader.finish is not None
        finish_response(response, reader.finish, reader.blocks.all, usage)
        if response.store:
            turns = Turns(messages)
            turns.answer(reader.blocks.all)
            self.store.keep(request.caller.id, response.id, msgspec.json.encode(response), turns.messages)


def _new_id(kind: Kind) -> str:
    return f'{PREFIXES[kind]}_{uuid4().hex}'
