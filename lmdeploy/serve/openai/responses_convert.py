"""From the body of a response to the plan of a chat; pure: nothing here waits, counts or sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.openai.convert import ChatPlan, chat_plan
from lmdeploy.serve.openai.protocol import (
    IMAGES,
    AllowedTools,
    AllowedToolsChoice,
    ChatRequest,
    Function,
    FunctionName,
    Message,
    NamedTool,
    Tool,
)
from lmdeploy.serve.openai.responses_protocol import (
    AllowedFunctions,
    CallItem,
    CallOutputItem,
    ChosenFunction,
    Item,
    MessageItem,
    OtherItem,
    OtherTool,
    Part,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
    ToolItem,
)
from lmdeploy.serve.parsers import ParserNames
from lmdeploy.serve.turns import Turns

METADATA_ENTRIES, METADATA_KEY, METADATA_VALUE = 16, 64, 512
TEXTS = ('input_text', 'output_text', 'text', 'reasoning_text', 'summary_text')
"""Types of parts that are text."""


def conversation(body: ResponsesRequest, before: Sequence[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """The messages of the earlier responses and of this input, without the instructions.

    Raises:
        HttpError: LMD-512, LMD-513.
    """
    turns = Turns(before)
    if isinstance(body.input, str):
        turns.say('user', body.input)
    else:
        limits.check('messages', body.input, 'input')
        for i, item in enumerate(body.input):
            _add(turns, item, f'input.{i}')
    if not turns.messages:
        raise HttpError('LMD-512', param='input', reason='there is no input')
    limits.check('messages', turns.messages, 'input')
    return turns.messages


def response_plan(body: ResponsesRequest, messages: Sequence[dict[str, Any]], limits: Limits,
                  parsers: ParserNames) -> ChatPlan:
    """What a request for a response asks for.

    Args:
        messages: what was said: :func:`conversation`.
        parsers: those that fit the model.

    Raises:
        HttpError: LMD-512, LMD-513.
    """
    limits.check('max_tokens', body.max_output_tokens or 0, 'max_output_tokens')
    _check_metadata(body.metadata or {})
    choice = _choice(body.tool_choice)
    form = _format(None if body.text is None else body.text.format)
    if form is not None and (body.tool_choice == 'required' or isinstance(choice, NamedTool)):
        raise HttpError('LMD-512', param='text.format', reason='a call that must be made has a form of its own')
    effort = None if body.reasoning is None else body.reasoning.effort
    told = [{'role': 'system', 'content': body.instructions}] if body.instructions else []
    chat = ChatRequest.model_validate({
        'model': body.model, 'messages': [Message.model_construct(**message) for message in (*told, *messages)],
        'max_tokens': body.max_output_tokens, 'temperature': body.temperature, 'top_p': body.top_p, 'user': body.user,
        'tools': [_tool(i, tool) for i, tool in enumerate(body.tools)] if body.tools else None, 'tool_choice': choice,
        'parallel_tool_calls': body.parallel_tool_calls, 'reasoning_effort': 'max' if effort == 'xhigh' else effort,
        'response_format': form})
    return chat_plan(chat, limits, parsers)


def _add(turns: Turns, item: Item, place: str) -> None:
    if isinstance(item, MessageItem):
        _say(turns, item, f'{place}.content')
    elif isinstance(item, CallItem):
        turns.call(item.call_id, item.name, item.arguments, f'{place}.call_id')
    elif isinstance(item, CallOutputItem):
        turns.result(item.call_id, _text(item.output, f'{place}.output'), f'{place}.call_id')
    elif isinstance(item, ReasoningItem):
        text = _text(item.content or item.summary or [], f'{place}.content')
        if text:
            turns.think(text)
    else:
        assert isinstance(item, OtherItem)
        raise HttpError('LMD-513', param=place, reason=f'items of type {item.type[:100]!r} are not known here')


def _say(turns: Turns, item: MessageItem, place: str) -> None:
    """A message; its texts and pictures in their order."""
    if isinstance(item.content, str) or not any(part.type == 'input_image' for part in item.content):
        turns.say(item.role, _text(item.content, place))
        return
    said: list[str | dict[str, Any]] = []
    for k, part in enumerate(item.content):
        if part.type != 'input_image':
            said.append(_text([part], f'{place}.{k}'))
        elif part.image_url is None:
            raise HttpError('LMD-513', param=f'{place}.{k}', reason='only pictures with an image_url are known here')
        else:
            shown = {'url': part.image_url} | ({'detail': part.detail} if part.detail else {})
            said.append({'type': 'image_url', 'image_url': shown})
    turns.put(item.role, said)


def _text(content: str | list[Part], place: str) -> str:
    """The text of a message or a result."""
    if isinstance(content, str):
        return content
    texts = []
    for k, part in enumerate(content):
        if part.type == 'refusal' and part.refusal is not None:
            texts.append(part.refusal)
            continue
        if part.type not in TEXTS:
            raise HttpError('LMD-513', param=f'{place}.{k}', reason=f'it is of type {part.type[:100]!r}, and {IMAGES}')
        if part.text is None:
            raise HttpError('LMD-512', param=f'{place}.{k}.text', reason='Field required')
        texts.append(part.text)
    return '\n'.join(texts)


def _tool(index: int, tool: ToolItem) -> Tool:
    if isinstance(tool, OtherTool):
        raise HttpError('LMD-513', param=f'tools.{index}.type',
                        reason=f'{tool.type[:100]!r} is a tool that the server runs, and this one runs none')
    return Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.parameters,
                                  strict=tool.strict))


def _choice(choice: Any) -> Any:
    """The choice among the tools in the terms of chat completions."""
    if isinstance(choice, ChosenFunction):
        return _named(choice)
    if isinstance(choice, AllowedFunctions):
        return AllowedToolsChoice(type='allowed_tools', allowed_tools=AllowedTools(
            mode=choice.mode, tools=[_named(tool) for tool in choice.tools]))
    return choice


def _named(choice: ChosenFunction) -> NamedTool:
    return NamedTool(function=FunctionName(name=choice.name))


def _format(form: TextFormat | None) -> dict[str, Any] | None:
    """``text.format`` in the terms of chat completions; None: any text."""
    if form is None or form.type == 'text':
        return None
    if form.type == 'json_object':
        return {'type': 'json_object'}
    if form.schema_ is None or not form.name:
        raise HttpError('LMD-512', param='text.format', reason='a json_schema needs name and schema')
    return {'type': 'json_schema', 'json_schema': {'name': form.name, 'schema': form.schema_, 'strict': form.strict}}


def _check_metadata(metadata: dict[str, str]) -> None:
    if len(metadata) > METADATA_ENTRIES:
        raise HttpError('LMD-512', param='metadata', reason=f'it has more than {METADATA_ENTRIES} entries')
    for key, value in metadata.items():
        if len(key) > METADATA_KEY or len(value) > METADATA_VALUE:
            raise HttpError('LMD-512', param='metadata', reason=f'keys have at most {METADATA_KEY} characters, values '
                                                                f'at most {METADATA_VALUE}')
