"""What some templates do beyond boxes: tools, tool results, reasoning. Small functions that the table refers to.

A *rewrite* takes the messages and the OpenAI-style tools and gives messages for which boxes are enough. Each follows
the format that the model's makers publish with it, because that is what the model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lmdeploy.chat.messages import call_arguments, get_text

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Rewrite = Callable[[Messages, Tools, str | None], Messages]
"""``(messages, tools, default system text or None) -> messages``"""


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def functions(tools: Tools) -> list[dict[str, Any]]:
    """The function descriptions inside OpenAI-style tools."""
    return [tool.get('function', tool) for tool in tools or []]


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The function calls of an assistant message as ``{'name': ..., 'arguments': ...}``."""
    found = [call.get('function', call) for call in message.get('tool_calls') or []]
    return [{'name': call.get('name', ''), 'arguments': call_arguments(call)} for call in found]


def _system(messages: Messages, default: str | None) -> tuple[str | None, Messages]:
    """The system text (the default if there is none) and the other messages."""
    if messages and messages[0]['role'] in ('system', 'developer'):
        return get_text(messages[0].get('content')), messages[1:]
    return default, messages


# InternLM 2 and 3: tools are a system message named <|plugin|>, results come from the environment.

def internlm_tools(messages: Messages, tools: Tools, default: str | None) -> Messages:
    result = []
    for message in messages:
        text = get_text(message.get('content'))
        for call in calls(message):
            body = {'name': call['name'], 'parameters': call['arguments']}
            text += f'<|action_start|><|plugin|>\n{dumps(body)}<|action_end|>'
        result.append({'role': message['role'], 'content': text, 'name': message.get('name')})
    if tools:
        described = {'role': 'system', 'content': dumps(functions(tools)), 'name': 'plugin'}
        at = 1 if result and result[0]['role'] == 'system' else 0
        if at == 0 and default is not None:
            result.insert(0, {'role': 'system', 'content': default, 'name': None})
            at = 1
        result.insert(at, described)
    return result


def internlm_named(before: str, message: dict[str, Any]) -> str:
    """A box told its channel: messages named plugin or interpreter carry that control token."""
    channel = {'plugin': '<|plugin|>', 'interpreter': '<|interpreter|>'}.get(message.get('name') or '')
    return f'{before.rstrip()} name={channel}\n' if channel else before


# Qwen 2.5, QwQ and Qwen 3: tools inside XML tags of the system message, results inside a user message.

QWEN_TOOLS = (
    '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n'
    'You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n'
    'For each function call, return a json object with function name and arguments within <tool_call></tool_call> '
    'XML tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>')


def qwen_tools(messages: Messages, tools: Tools, default: str | None) -> Messages:
    system, rest = _system(messages, default)
    result: Messages = []
    if tools:
        described = QWEN_TOOLS.format(tools=''.join('\n' + dumps(tool) for tool in tools))
        # without a system text, the block begins the message
        result.append({'role': 'system', 'content': system + described if system else described.lstrip('\n')})
    elif rest is not messages:
        result.append({'role': 'system', 'content': system})
    previous = None
    for message in rest:
        text, role = get_text(message.get('content')), message['role']
        if role in ('tool', 'function'):
            response = f'<tool_response>\n{text}\n</tool_response>'
            if previous in ('tool', 'function'):
                result[-1]['content'] += '\n' + response
            else:
                result.append({'role': 'user', 'content': response})
        else:
            for call in calls(message):
                text += ('\n' if text else '') + f'<tool_call>\n{dumps(call)}\n</tool_call>'
            result.append({'role': role, 'content': text})
        previous = role
    return result


def last_reasoning_only(messages: Messages) -> Messages:
    """Drop the reasoning of all answers but a final one: the models are trained on histories without it."""
    return [{**m, 'content': get_text(m.get('content')).split('</think>')[-1].lstrip('\n')}
            if m['role'] == 'assistant' and i < len(messages) - 1 else m for i, m in enumerate(messages)]


def qwen3_tools(messages: Messages, tools: Tools, default: str | None) -> Messages:
    return qwen_tools(last_reasoning_only(messages), tools, default)


def reasoning_dropped(messages: Messages, tools: Tools, default: str | None) -> Messages:
    return last_reasoning_only(messages)


# Llama 3.1: a dated system message; tools in front of the first user message; results from ipython.

LLAMA3_DATES = 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'
LLAMA3_TOOLS = (
    'Given the following functions, please respond with a JSON for a function call with its proper arguments that '
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    'argument name and its value}. Do not use variables.\n\n')


def llama3_tools(messages: Messages, tools: Tools, default: str | None) -> Messages:
    system, rest = _system(messages, default)
    environment = 'Environment: ipython\n' if tools else ''
    result: Messages = [{'role': 'system', 'content': environment + LLAMA3_DATES + (system or '')}]
    described = LLAMA3_TOOLS + ''.join(dumps(tool, indent=4) + '\n\n' for tool in tools) if tools else ''
    for message in rest:
        text, role = get_text(message.get('content')), message['role']
        if role == 'user' and described:
            text, described = described + text, ''
        if role in ('tool', 'function', 'ipython'):
            role, text = 'ipython', dumps(text)
        for call in calls(message):
            text += dumps({'name': call['name'], 'parameters': call['arguments']})
        result.append({'role': role, 'content': text})
    return result


def system_in_user(messages: Messages, tools: Tools, default: str | None) -> Messages:
    """For formats without a system message: its text opens the first user message."""
    system, rest = _system(messages, None)
    if not system:
        return rest
    for i, message in enumerate(rest):
        if message['role'] == 'user':
            text = f'{system}\n\n{get_text(message.get("content"))}'
            return [*rest[:i], {**message, 'content': text}, *rest[i + 1:]]
    return [{'role': 'user', 'content': system}, *rest]


# What the answer begins with.

def think_block(assistant: str, enable_thinking: bool | None) -> str:
    """Qwen 3: an empty reasoning block tells the model to answer at once."""
    return assistant + '<think>\n\n</think>\n\n' if enable_thinking is False else assistant


def think_open(assistant: str, enable_thinking: bool | None) -> str:
    """QwQ and DeepSeek-R1: the answer begins inside the reasoning."""
    return assistant + '<think>\n'


def think_choice(assistant: str, enable_thinking: bool | None) -> str:
    """DeepSeek-R1: reasoning unless it was switched off."""
    return assistant + ('<think>\n\n</think>\n\n' if enable_thinking is False else '<think>\n')


def unspaced(assistant: str, enable_thinking: bool | None) -> str:
    """Formats whose answers begin with a space that the model itself writes."""
    return assistant.rstrip(' ')


def unbroken(assistant: str, enable_thinking: bool | None) -> str:
    """Formats whose answers begin with a line break that the model itself writes."""
    return assistant.rstrip('\n')
