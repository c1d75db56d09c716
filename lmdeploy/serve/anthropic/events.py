"""What the server says in Anthropic's terms: whole messages, the events of a stream as ready bytes, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from lmdeploy.serve.anthropic.partial import partial_object
from lmdeploy.serve.blocks import Block, Step
from lmdeploy.serve.errors import Failure, describe, failure
from lmdeploy.serve.generation import Usage
from lmdeploy.serve.sse import named_event

StopReason = Literal['end_turn', 'max_tokens', 'stop_sequence', 'tool_use', 'model_context_window_exceeded', 'abort']
"""``'abort'``, which Anthropic has not: the request was ended by ``/abort_request``."""


class TextContent(msgspec.Struct, tag_field='type', tag='text', kw_only=True):
    text: str
    citations: None = None


class ThinkingContent(msgspec.Struct, tag_field='type', tag='thinking', kw_only=True):
    """``signature`` is empty: what comes back is read as it is."""

    thinking: str
    signature: str = ''


class ToolUseContent(msgspec.Struct, tag_field='type', tag='tool_use', kw_only=True):
    id: str
    name: str
    input: dict[str, Any]


Content = TextContent | ThinkingContent | ToolUseContent


class OutputDetails(msgspec.Struct):
    thinking_tokens: int


class MessageUsage(msgspec.Struct):
    """``input_tokens`` are all tokens of the prompt. The prefix cache acts by itself, not by request: the counts of a
    cache that requests manage are 0."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens_details: OutputDetails | msgspec.UnsetType = msgspec.UNSET


class MessageAnswer(msgspec.Struct, kw_only=True):
    """An answer, or at the beginning of a stream what is known of it."""

    id: str
    type: str = 'message'
    role: str = 'assistant'
    model: str
    content: list[Content]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    input_tokens: int


class ErrorInfo(msgspec.Struct):
    type: str
    message: str


class ErrorAnswer(msgspec.Struct):
    """Anthropic's body of an error."""

    error: ErrorInfo
    request_id: str
    type: str = 'error'


ERROR_TYPES = {400: 'invalid_request_error', 401: 'authentication_error', 403: 'permission_error',
               404: 'not_found_error', 413: 'request_too_large', 429: 'rate_limit_error', 500: 'api_error',
               503: 'overloaded_error', 504: 'timeout_error'}
"""By status; other errors of the client are ``invalid_request_error``, others ``api_error``."""


def usage_of(usage: Usage) -> MessageUsage:
    return MessageUsage(usage.prompt, usage.generated, output_tokens_details=OutputDetails(usage.reasoning))


def content_of(blocks: Sequence[Block]) -> list[Content]:
    """The blocks of a whole answer."""
    return [_content(block) for block in blocks]


def _content(block: Block) -> Content:
    if block.kind == 'text':
        return TextContent(text=block.text)
    if block.kind == 'reasoning':
        return ThinkingContent(thinking=block.text)
    return ToolUseContent(id=block.id, name=block.name, input=partial_object(block.text))


def start_event(message: MessageAnswer) -> bytes:
    """The first events of a stream."""
    return (named_event('message_start', {'type': 'message_start', 'message': message})
            + b'event: ping\ndata: {"type":"ping"}\n\n')


def step_event(step: Step) -> bytes:
    """What happens to a block."""
    index = step.block.index
    if step.kind == 'grow':
        kind, key = DELTAS[step.block.kind]
        return (b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
                b'"delta":{"type":"%s","%s":%s}}\n\n' % (index, kind, key, msgspec.json.encode(step.text)))
    if step.kind == 'end':
        return b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n' % index
    block = step.block
    empty = Block(index, block.kind, block.id, block.name)
    return named_event('content_block_start', {'type': 'content_block_start', 'index': index,
                                               'content_block': _content(empty)})


DELTAS = {'text': (b'text_delta', b'text'), 'reasoning': (b'thinking_delta', b'thinking'),
          'call': (b'input_json_delta', b'partial_json')}


def end_event(stop_reason: StopReason, stop_sequence: str | None, usage: Usage) -> bytes:
    """The last events of a stream."""
    return (named_event('message_delta', {
        'type': 'message_delta', 'delta': {'stop_reason': stop_reason, 'stop_sequence': stop_sequence},
        'usage': usage_of(usage)}) + b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


def error_answer(error: BaseException, request_id: str) -> ErrorAnswer:
    """An error in Anthropic's form; its text begins with the code."""
    fault, detail = describe(error, request_id)
    kind = ERROR_TYPES.get(fault.status, 'invalid_request_error' if fault.status < 500 else 'api_error')
    return ErrorAnswer(ErrorInfo(kind, f'{detail.lmdeploy_code}: {detail.message}'), request_id)


def error_event(error: BaseException, request_id: str) -> bytes:
    """The event that ends a stream which broke."""
    return named_event('error', error_answer(error, request_id))


def message_failure(error: BaseException, request_id: str) -> Failure:
    """The response that tells a client of ``error``, for the routes of this package."""
    told = failure(error, request_id)
    return Failure(told.status, msgspec.json.encode(error_answer(error, request_id)), told.code, told.headers)
