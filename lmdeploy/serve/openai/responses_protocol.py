"""Bodies of ``/v1/responses``, as types. The rule for every field is that of :mod:`lmdeploy.serve.body`.

Items of the input are told apart by their ``type``; one that this version cannot use is read as :class:`OtherItem`, a
tool of the server as :class:`OtherTool`, and both are refused by :mod:`lmdeploy.serve.openai.responses_convert`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lmdeploy.serve.body import ELSEWHERE, Body, Many, Probability, Refusals

CallId = Annotated[str, Field(min_length=1, max_length=256)]
FunctionName = Annotated[str, Field(min_length=1, max_length=256)]
REFUSED: Refusals = {
    'background': ((False,), 'an answer ends with its connection'),
    'context_management': (([],), 'a conversation is read as it is sent'),
    'conversation': ((), 'use previous_response_id'),
    'max_tool_calls': ((), 'it limits tools that the server runs, and this one runs none'),
    'moderation': ((), ELSEWHERE),
    'prompt': ((), 'this server keeps no prompts; send instructions'),
    'service_tier': (('auto', 'default'), 'there is one tier'),
    'top_logprobs': ((0,), 'use /v1/chat/completions for log-probabilities'),
    'truncation': (('disabled',), 'nothing is cut from a conversation'),
}
"""Known fields that this version does not have: the values that ask for nothing, and the reason."""
NO_EFFECT = frozenset({'prompt_cache_key', 'prompt_cache_options', 'prompt_cache_retention', 'safety_identifier'})
"""Known fields that are wishes or labels, and change no answer."""


def _type_of(value: Any) -> Any:
    return value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)


class Part(Body):
    """A part of a message; those that are neither text nor a picture are refused."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None


class MessageItem(Body):
    """Somebody says something."""

    type: Literal['message'] | None = 'message'
    role: Literal['user', 'assistant', 'system', 'developer']
    content: str | Many[Part]


class CallItem(Body):
    """The model called a function."""

    type: Literal['function_call']
    call_id: CallId
    name: FunctionName
    arguments: str


class CallOutputItem(Body):
    """What the function gave."""

    type: Literal['function_call_output']
    call_id: CallId
    output: str | Many[Part]


class ReasoningItem(Body):
    """What the model thought, as it was answered."""

    type: Literal['reasoning']
    summary: Many[Part] | None = None
    content: Many[Part] | None = None


class OtherItem(Body):
    type: str


TAGS = {None: 'MessageItem', 'message': 'MessageItem', 'function_call': 'CallItem',
        'function_call_output': 'CallOutputItem', 'reasoning': 'ReasoningItem'}


def _item_tag(value: Any) -> str:
    kind = _type_of(value)
    return TAGS.get(kind, 'OtherItem') if kind is None or isinstance(kind, str) else 'OtherItem'


Item = Annotated[
    Annotated[MessageItem, Tag('MessageItem')] | Annotated[CallItem, Tag('CallItem')] |
    Annotated[CallOutputItem, Tag('CallOutputItem')] | Annotated[ReasoningItem, Tag('ReasoningItem')] |
    Annotated[OtherItem, Tag('OtherItem')], Discriminator(_item_tag)]


class FunctionTool(Body):
    type: Literal['function']
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(Body):
    type: str


def _function_tag(value: Any) -> str:
    return 'FunctionTool' if _type_of(value) == 'function' else 'OtherTool'


ToolItem = Annotated[Annotated[FunctionTool, Tag('FunctionTool')] | Annotated[OtherTool, Tag('OtherTool')],
                     Discriminator(_function_tag)]


class ChosenFunction(Body):
    type: Literal['function']
    name: FunctionName


class AllowedFunctions(Body):
    type: Literal['allowed_tools']
    mode: Literal['auto', 'required'] = 'auto'
    tools: Many[ChosenFunction]


class TextFormat(Body):
    """``json_schema`` has ``name`` and ``schema`` beside its type."""

    type: Literal['text', 'json_object', 'json_schema']
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias='schema')
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: Literal['low', 'medium', 'high'] | None = None


class ReasoningConfig(Body):
    """A model that thinks is shown thinking as it is: there are no summaries of it."""

    effort: Literal['none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max'] | None = None
    summary: Literal['auto'] | None = None
    generate_summary: Literal['auto'] | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Body):
    """``POST /v1/responses``."""

    refused = REFUSED
    no_effect = NO_EFFECT

    model: str
    input: str | Many[Item] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=256)
    store: bool | None = Field(True, description='remember the answer for previous_response_id')
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(0.7, ge=0, le=2)
    top_p: Probability | None = 1.0
    tools: Many[ToolItem] | None = None
    tool_choice: Literal['auto', 'none', 'required'] | ChosenFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = True
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: Many[Literal['reasoning.encrypted_content']] | None = Field(
        None, description='reasoning items are complete without it')
    metadata: dict[str, str] | None = None
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    user: str | None = None
