"""What the server says in the terms of OpenAI's responses: the response, its items, and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from lmdeploy.serve.blocks import Block, Step
from lmdeploy.serve.errors import describe
from lmdeploy.serve.generation import Usage
from lmdeploy.serve.openai.answers import ReasoningTokens
from lmdeploy.serve.openai.convert import or_default
from lmdeploy.serve.openai.responses_protocol import FunctionTool, ReasoningConfig, ResponsesRequest
from lmdeploy.serve.sse import named_event

Status = Literal['in_progress', 'completed', 'incomplete']


class OutputText(msgspec.Struct, tag_field='type', tag='output_text', kw_only=True):
    text: str
    annotations: list[None] = []
    logprobs: list[None] = []


class ReasoningText(msgspec.Struct, tag_field='type', tag='reasoning_text', kw_only=True):
    text: str


class MessageOutput(msgspec.Struct, tag_field='type', tag='message', kw_only=True):
    id: str
    status: Status
    role: str = 'assistant'
    content: list[OutputText]


class ReasoningOutput(msgspec.Struct, tag_field='type', tag='reasoning', kw_only=True):
    """What the model thought, as it is; there are no summaries."""

    id: str
    status: Status
    summary: list[None] = []
    content: list[ReasoningText]


class CallOutput(msgspec.Struct, tag_field='type', tag='function_call', kw_only=True):
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem = MessageOutput | ReasoningOutput | CallOutput


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseFailure(msgspec.Struct):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response, finished or on its way. Its parameters are those that acted."""

    id: str
    object: str = 'response'
    created_at: int
    status: Literal['in_progress', 'completed', 'incomplete', 'cancelled', 'failed'] = 'in_progress'
    completed_at: int | None = None
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    service_tier: str = 'default'
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int = 0
    top_p: float
    truncation: str = 'disabled'
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


class ResponseDeleted(msgspec.Struct):
    id: str
    object: str = 'response'
    deleted: bool = True


def new_response(response_id: str, body: ResponsesRequest) -> ResponseObject:
    """A response that is about to begin."""
    text: dict[str, Any] = {} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
    text.setdefault('format', {'type': 'text'})
    reasoning = body.reasoning or ReasoningConfig(effort=None, summary=None, generate_summary=None)
    choice = body.tool_choice or 'auto'
    return ResponseObject(
        id=response_id, created_at=int(time.time()), model=body.model, instructions=body.instructions,
        max_output_tokens=body.max_output_tokens, parallel_tool_calls=or_default(body.parallel_tool_calls, True),
        previous_response_id=body.previous_response_id, store=or_default(body.store, True),
        reasoning={'effort': reasoning.effort, 'summary': reasoning.summary},
        temperature=or_default(body.temperature, 0.7), top_p=or_default(body.top_p, 1.0), text=text,
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        tools=[_tool(tool) for tool in body.tools or () if isinstance(tool, FunctionTool)], user=body.user,
        metadata=body.metadata or {})


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {'type': 'function', 'name': tool.name, 'description': tool.description, 'parameters': tool.parameters,
            'strict': tool.strict}


def finish_response(response: ResponseObject, finish: str, blocks: Sequence[Block], usage: Usage) -> None:
    """Fill in how a response ended."""
    response.output = [output_item(block) for block in blocks]
    response.usage = ResponseUsage(usage.prompt, InputDetails(usage.cached), usage.generated,
                                   ReasoningTokens(usage.reasoning), usage.prompt + usage.generated)
    if finish == 'length':
        response.status, response.incomplete_details = 'incomplete', IncompleteDetails('max_output_tokens')
    else:
        response.status = 'cancelled' if finish == 'abort' else 'completed'
        response.completed_at = int(time.time())


def output_item(block: Block, *, begun: bool = False) -> OutputItem:
    """A block as an item; ``begun``: it has just begun, and has nothing yet."""
    status: Status = 'in_progress' if begun else 'completed' if block.complete else 'incomplete'
    if block.kind == 'call':
        return CallOutput(id=item_id(block), status=status, call_id=block.id, name=block.name,
                          arguments='' if begun else block.text)
    if block.kind == 'reasoning':
        return ReasoningOutput(id=block.id, status=status, content=[] if begun else [ReasoningText(text=block.text)])
    return MessageOutput(id=block.id, status=status, content=[] if begun else [OutputText(text=block.text)])


def item_id(block: Block) -> str:
    """An item has an id beside the one that the result of a call names."""
    return f'fc_{block.id.partition("_")[2]}' if block.kind == 'call' else block.id


class ResponseEvents:
    """The events of one stream, as ready bytes, each with its number."""

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._next = 0

    def begin(self) -> bytes:
        return self._whole('response.created') + self._whole('response.in_progress')

    def step(self, step: Step) -> bytes:
        """What happens to a block."""
        if step.kind == 'grow':
            return self._delta(step.block, step.text)
        place = {'item_id': item_id(step.block), 'output_index': step.block.index}
        return self._begin(step.block, place) if step.kind == 'begin' else self._end(step.block, place)

    def end(self) -> bytes:
        """The response has ended."""
        return self._whole('response.completed' if self.response.status == 'completed' else 'response.incomplete')

    def fail(self, error: BaseException, request_id: str) -> bytes:
        """The event that ends a stream which broke."""
        _, detail = describe(error, request_id)
        self.response.status = 'failed'
        self.response.error = ResponseFailure('server_error', f'{detail.lmdeploy_code}: {detail.message}')
        return self._whole('response.failed')

    def _begin(self, block: Block, place: dict[str, Any]) -> bytes:
        added = self._event('response.output_item.added',
                            {'output_index': block.index, 'item': output_item(block, begun=True)})
        if block.kind == 'call':
            return added
        return added + self._event('response.content_part.added',
                                   place | {'content_index': 0, 'part': _part(block, '')})

    def _end(self, block: Block, place: dict[str, Any]) -> bytes:
        if block.kind == 'call':
            done = self._event('response.function_call_arguments.done',
                               place | {'name': block.name, 'arguments': block.text})
        else:
            place |= {'content_index': 0}
            more: dict[str, Any] = {'logprobs': []} if block.kind == 'text' else {}
            name = 'output_text' if block.kind == 'text' else 'reasoning_text'
            done = (self._event(f'response.{name}.done', place | {'text': block.text} | more)
                    + self._event('response.content_part.done', place | {'part': _part(block, block.text)}))
        return done + self._event('response.output_item.done',
                                  {'output_index': block.index, 'item': output_item(block)})

    def _delta(self, block: Block, text: str) -> bytes:
        name, more = DELTAS[block.kind]
        return (b'event: %s\ndata: {"type":"%s","item_id":"%s","output_index":%d,%s"delta":%s,"sequence_number":%d}\n\n'
                % (name, name, item_id(block).encode(), block.index, more, msgspec.json.encode(text), self._number()))

    def _whole(self, name: str) -> bytes:
        return self._event(name, {'response': self.response})

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        return named_event(name, {'type': name, **fields, 'sequence_number': self._number()})

    def _number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number


DELTAS = {'text': (b'response.output_text.delta', b'"content_index":0,"logprobs":[],'),
          'reasoning': (b'response.reasoning_text.delta', b'"content_index":0,'),
          'call': (b'response.function_call_arguments.delta', b'')}


def _part(block: Block, text: str) -> OutputText | ReasoningText:
    return OutputText(text=text) if block.kind == 'text' else ReasoningText(text=text)
