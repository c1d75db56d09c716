"""Bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``, as types.

The rule is that of :mod:`lmdeploy.serve.body`: a field acts, or is refused where it asks for what this
version cannot do, or is left out with a line in the log. Content blocks are told apart by their ``type``; one that a
model of texts cannot be given is read as :class:`OtherBlock` and refused by :mod:`lmdeploy.serve.anthropic.convert`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lmdeploy.serve.body import ELSEWHERE, Body, Many, Probability, Refusals

TOOL_REFUSED = {'defer_loading': (None, False), 'allowed_callers': (None, [], ['direct']), 'input_examples': (None, [])}
"""Fields of a tool, and the values that ask for nothing."""
KEEP_THINKING = {'edits': [{'type': 'clear_thinking_20251015', 'keep': 'all'}]}
REFUSED: Refusals = {
    'container': ((), ELSEWHERE),
    'context_management': (({}, {'edits': []}, KEEP_THINKING), 'a conversation is read as it is sent'),
    'diagnostics': ((), ELSEWHERE),
    'fallbacks': (([],), ELSEWHERE),
    'inference_geo': ((), 'inference happens on this server'),
    'mcp_servers': (([],), ELSEWHERE),
    'output_format': ((), 'use output_config'),
    'speed': (('standard',), 'there is one speed'),
}
"""Known fields that this version does not have: the values that ask for nothing, and the reason."""
NO_EFFECT = frozenset({'anthropic_beta', 'anthropic_version', 'betas', 'cache_control', 'service_tier',
                       'user_profile_id', 'workspace_id'})
"""Known fields that are wishes or labels, and change no answer. Prefixes are cached without ``cache_control``."""


def _type_of(value: Any) -> Any:
    """The ``type`` of an object of a request, or of one that is built."""
    return value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)


class TextBlock(Body):
    type: Literal['text']
    text: str


class ThinkingBlock(Body):
    """What the model thought earlier, as it was answered."""

    type: Literal['thinking']
    thinking: str
    signature: str | None = None


class ToolUseBlock(Body):
    type: Literal['tool_use']
    id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any]


class ImageSource(Body):
    """Where a picture is: base64 text with its media type, or a URL."""

    type: Literal['base64', 'url']
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class ImageBlock(Body):
    type: Literal['image']
    source: ImageSource


class OtherBlock(Body):
    """A document, or what else there is."""

    type: str


RESULT_TAGS = {'text': 'TextBlock', 'image': 'ImageBlock'}


def _result_tag(value: Any) -> str:
    kind = _type_of(value)
    return RESULT_TAGS.get(kind, 'OtherBlock') if isinstance(kind, str) else 'OtherBlock'


ResultPart = Annotated[
    Annotated[TextBlock, Tag('TextBlock')] | Annotated[ImageBlock, Tag('ImageBlock')] |
    Annotated[OtherBlock, Tag('OtherBlock')], Discriminator(_result_tag)]


class ToolResultBlock(Body):
    """What a call gave; ``is_error`` puts "Error: " in front of it."""

    type: Literal['tool_result']
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: str | Many[ResultPart] | None = None
    is_error: bool | None = False


TAGS = {**RESULT_TAGS, 'thinking': 'ThinkingBlock', 'tool_use': 'ToolUseBlock', 'tool_result': 'ToolResultBlock'}


def _block_tag(value: Any) -> str:
    kind = _type_of(value)
    return TAGS.get(kind, 'OtherBlock') if isinstance(kind, str) else 'OtherBlock'


Block = Annotated[
    Annotated[TextBlock, Tag('TextBlock')] | Annotated[ThinkingBlock, Tag('ThinkingBlock')] |
    Annotated[ImageBlock, Tag('ImageBlock')] | Annotated[ToolUseBlock, Tag('ToolUseBlock')] |
    Annotated[ToolResultBlock, Tag('ToolResultBlock')] |
    Annotated[OtherBlock, Tag('OtherBlock')], Discriminator(_block_tag)]


class MessageParam(Body):
    """One turn. Neighbours of one role are one turn; a last one of the assistant is continued."""

    role: Literal['user', 'assistant', 'system']
    content: str | Many[Block]


class ToolParam(Body):
    """A function; there are no tools of the server's own."""

    type: str | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Body):
    """``any`` and ``tool`` are enforced: the answer is a call. ``disable_parallel_tool_use``: one call at most."""

    type: Literal['auto', 'any', 'tool', 'none']
    name: str | None = None
    disable_parallel_tool_use: bool | None = False


class Thinking(Body):
    """Whether the model thinks first. ``budget_tokens`` is a goal, not a limit; ``max_tokens`` is the limit."""

    type: Literal['enabled', 'disabled', 'adaptive']
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal['summarized'] | None = Field(None, description='thinking is shown as it is')


class OutputFormat(Body):
    """The answer is an instance of a JSON schema."""

    type: Literal['json_schema']
    schema_: dict[str, Any] = Field(alias='schema')


class OutputConfig(Body):
    format: OutputFormat | None = None
    effort: Literal['low', 'medium', 'high', 'xhigh', 'max'] | None = None


class Metadata(Body):
    user_id: str | None = None


class CountTokensRequest(Body):
    """``POST /v1/messages/count_tokens``: a request without what only answering needs."""

    refused = REFUSED
    no_effect = NO_EFFECT

    model: str
    messages: Many[MessageParam]
    system: str | Many[TextBlock] | None = None
    tools: Many[ToolParam] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(0.7, ge=0, le=2)
    top_p: Probability | None = 1.0
    top_k: int | None = Field(40, ge=0, description='0 is off')
    stop_sequences: Many[str] | None = None
    stream: bool | None = False
    metadata: Metadata | None = None
