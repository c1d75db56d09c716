"""From Anthropic's bodies to the plan of a chat; pure: nothing here waits, counts or sends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmdeploy.serve.anthropic.protocol import (
    TOOL_REFUSED,
    CountTokensRequest,
    ImageBlock,
    MessageParam,
    MessagesRequest,
    OtherBlock,
    TextBlock,
    ThinkingBlock,
    ToolParam,
    ToolResultBlock,
    ToolUseBlock,
)
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.openai.convert import ChatPlan, chat_plan, stop_texts
from lmdeploy.serve.openai.protocol import IMAGES, ChatRequest, Function, FunctionName, Message, NamedTool, Tool
from lmdeploy.serve.parsers import ParserNames
from lmdeploy.serve.turns import Turns

ERROR = 'Error: '
"""Tells the model that the result of a call is an error."""
EFFORTS = {'xhigh': 'max'}
"""Efforts that chat templates spell differently."""


def message_plan(body: MessagesRequest, limits: Limits, parsers: ParserNames) -> ChatPlan:
    """What a request for a message asks for.

    Args:
        parsers: those that fit the model.

    Raises:
        HttpError: LMD-512, LMD-513.
    """
    limits.check('max_tokens', body.max_tokens, 'max_tokens')
    if body.metadata is not None:
        limits.check('name_chars', body.metadata.user_id or '', 'metadata.user_id')
    budget = None if body.thinking is None else body.thinking.budget_tokens
    if budget is not None and budget >= body.max_tokens:
        raise HttpError('LMD-512', param='thinking.budget_tokens', reason='it must be less than max_tokens')
    stops = stop_texts(body.stop_sequences, limits, 'stop_sequences')
    return _plan(body, limits, parsers, max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p,
                 top_k=body.top_k, stop=stops)


def count_plan(body: CountTokensRequest, limits: Limits, parsers: ParserNames) -> ChatPlan:
    """The plan whose prompt is that of the request for a message with the same fields.

    Raises:
        HttpError: LMD-512, LMD-513.
    """
    return _plan(body, limits, parsers, max_tokens=1, temperature=None, top_p=None, top_k=None, stop=None)


def _plan(body: CountTokensRequest, limits: Limits, parsers: ParserNames, *, max_tokens: int,
          temperature: float | None, top_p: float | None, top_k: int | None, stop: list[str] | None) -> ChatPlan:
    effort: Any = None
    if body.output_config is not None and body.output_config.effort is not None:
        effort = EFFORTS.get(body.output_config.effort, body.output_config.effort)
    choice = _choice(body)
    parallel = body.tool_choice is None or not body.tool_choice.disable_parallel_tool_use
    chat = ChatRequest.model_validate({
        'model': body.model, 'messages': [Message.model_construct(**m) for m in messages(body, limits)],
        'max_tokens': max_tokens, 'temperature': temperature, 'top_p': top_p, 'top_k': top_k, 'stop': stop,
        'tools': [_tool(i, tool) for i, tool in enumerate(body.tools)] if body.tools else None, 'tool_choice': choice,
        'parallel_tool_calls': parallel, 'enable_thinking': _thinking(body, parsers, choice),
        'reasoning_effort': effort, 'response_format': _format(body, choice)})
    return chat_plan(chat, limits, parsers)


def messages(body: CountTokensRequest, limits: Limits) -> list[dict[str, Any]]:
    """The conversation in the form of OpenAI's chat completions, ``system`` first.

    Raises:
        HttpError: LMD-512, LMD-513.
    """
    if not body.messages:
        raise HttpError('LMD-512', param='messages', reason='there is no message')
    limits.check('messages', body.messages, 'messages')
    turns = Turns(join=True)
    if body.system:
        turns.say('system', body.system if isinstance(body.system, str) else _texts(body.system))
    for i, message in enumerate(body.messages):
        _add(turns, message, f'messages.{i}.content')
    limits.check('messages', turns.messages, 'messages')
    return turns.messages


def _add(turns: Turns, message: MessageParam, param: str) -> None:
    """One message: its results and calls become messages and calls of their own."""
    if isinstance(message.content, str):
        turns.say(message.role, message.content)
        return
    for j, block in enumerate(message.content):
        place = f'{param}.{j}'
        if isinstance(block, TextBlock):
            turns.say(message.role, block.text)
        elif isinstance(block, ImageBlock):
            turns.put(message.role, [_image(block, place)])
        elif isinstance(block, ThinkingBlock) and message.role == 'assistant':
            turns.think(block.thinking)
        elif isinstance(block, ToolUseBlock) and message.role == 'assistant':
            turns.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False), f'{place}.id')
        elif isinstance(block, ToolResultBlock) and message.role == 'user':
            turns.result(block.tool_use_id, _result(block, place), f'{place}.tool_use_id')
            for k, part in enumerate(block.content if isinstance(block.content, list) else ()):
                if isinstance(part, ImageBlock):  # results are text: what they show, the user shows
                    turns.put('user', [_image(part, f'{place}.content.{k}')])
        elif isinstance(block, OtherBlock):
            raise _refuse(block, place)
        else:
            raise HttpError('LMD-512', param=place,
                            reason=f'a message of the {message.role} cannot have a block of type {block.type!r}')
    if not message.content and message.role != 'assistant':
        turns.say(message.role, '')


def _result(block: ToolResultBlock, place: str) -> str:
    """The text of what a call gave."""
    text = block.content or ''
    if not isinstance(text, str):
        for k, part in enumerate(text):
            if isinstance(part, OtherBlock):
                raise _refuse(part, f'{place}.content.{k}')
        text = _texts([part for part in text if isinstance(part, TextBlock)])
    return ERROR + text if block.is_error else text


def _image(block: ImageBlock, place: str) -> dict[str, Any]:
    """A picture in OpenAI's terms."""
    source = block.source
    if source.type == 'url' and source.url is not None:
        return {'type': 'image_url', 'image_url': {'url': source.url}}
    if source.type == 'base64' and source.data is not None:
        return {'type': 'image_url', 'image_url': {'url': f'data:{source.media_type or ""};base64,{source.data}'}}
    raise HttpError('LMD-512', param=f'{place}.source', reason=f'a source of type {source.type!r} needs its '
                    f'{"url" if source.type == "url" else "data"}')


def _texts(blocks: Sequence[TextBlock]) -> str:
    return '\n'.join(block.text for block in blocks)


def _refuse(block: OtherBlock, place: str) -> HttpError:
    return HttpError('LMD-513', param=place, reason=f'it is of type {block.type[:100]!r}, and {IMAGES}')


def _tool(index: int, tool: ToolParam) -> Tool:
    param = f'tools.{index}'
    if tool.type not in (None, 'custom'):
        raise HttpError('LMD-513', param=f'{param}.type',
                        reason=f'{tool.type[:100]!r} is a tool that the server runs, and this one runs none')
    if tool.input_schema is None:
        raise HttpError('LMD-512', param=f'{param}.input_schema', reason='Field required')
    for name, given in (tool.model_extra or {}).items():
        if given not in TOOL_REFUSED.get(name, (given,)):
            raise HttpError('LMD-513', param=f'{param}.{name}', reason='all tools are shown to the model as they are')
    return Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.input_schema,
                                  strict=tool.strict))


def _choice(body: CountTokensRequest) -> Any:
    """The choice among the tools in OpenAI's terms."""
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type == 'tool':
        if not choice.name:
            raise HttpError('LMD-512', param='tool_choice.name', reason='the choice of a tool needs its name')
        return NamedTool(function=FunctionName(name=choice.name))
    return 'required' if choice.type == 'any' else choice.type


def _thinking(body: CountTokensRequest, parsers: ParserNames, choice: Any) -> bool | None:
    """Whether the model thinks; None: as its template has it."""
    if body.thinking is None or body.thinking.type == 'adaptive':
        return None
    if body.thinking.type == 'disabled':
        return False
    if parsers.reasoning is None:
        raise HttpError('LMD-513', param='thinking', reason='this model does not think before it answers')
    if choice == 'required' or isinstance(choice, NamedTool):
        raise HttpError('LMD-512', param='thinking',
                        reason='an answer that must be a call has no room for thinking; use tool_choice auto')
    return True


def _format(body: CountTokensRequest, choice: Any) -> dict[str, Any] | None:
    """The form of the answer in OpenAI's terms."""
    if body.output_config is None or body.output_config.format is None:
        return None
    if choice == 'required' or isinstance(choice, NamedTool):
        raise HttpError('LMD-512', param='output_config.format',
                        reason='a call that must be made has a form of its own')
    return {'type': 'json_schema',
            'json_schema': {'name': 'answer', 'schema': body.output_config.format.schema_, 'strict': True}}
