"""Parsers by name, and the names that a chat template calls for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from lmdeploy.chat.registry import Registry
from lmdeploy.errors import ConfigError
from lmdeploy.serve.parsers.base import ReasoningParser, ToolParser, new_call_id
from lmdeploy.serve.parsers.reasoning.think import CLOSE, OPEN, ThinkParser
from lmdeploy.serve.parsers.tools.marked import InternLMTools, Llama3Tools, QwenTools

TOOL_PARSERS = Registry('tool parser')
"""Tool parsers by name: classes, or functions, called with ``new_id`` and ``names``. Register your own with
``@TOOL_PARSERS.register_module(name='...')``."""
TOOL_PARSERS.register_module(('qwen', 'qwen2d5', 'qwen3', 'hermes'), module=QwenTools)
TOOL_PARSERS.register_module(('internlm', 'internlm2', 'internlm3', 'intern-s1'), module=InternLMTools)
TOOL_PARSERS.register_module(('llama3', 'llama3_1', 'llama3_2'), module=Llama3Tools)


def _tags_first(inside: bool | None = None) -> ThinkParser:
    """Models that write both tags, unless the prompt has opened the block."""
    return ThinkParser(bool(inside))


def _inside_first(inside: bool | None = None) -> ThinkParser:
    """Models that leave the opening tag out."""
    return ThinkParser(inside is not False)


REASONING_PARSERS = Registry('reasoning parser')
"""Reasoning parsers by name: classes, or functions, called with ``inside``: whether the answer begins inside the
reasoning; None: the prompt does not say."""
REASONING_PARSERS.register_module(('default', 'qwen3', 'deepseek-v3', 'intern-s1'), module=_tags_first)
REASONING_PARSERS.register_module(('deepseek-r1', 'qwen-qwq'), module=_inside_first)


class ParserNames(NamedTuple):
    """What fits a template; None: it calls for no such parser."""

    tools: str | None
    reasoning: str | None


BY_TEMPLATE = {
    'qwen2d5': ParserNames('qwen2d5', None),
    'qwen2.5': ParserNames('qwen2d5', None),
    'qwen3': ParserNames('qwen3', 'qwen3'),
    'qwq_preview': ParserNames('qwen2d5', None),
    'qwq': ParserNames('qwen2d5', 'qwen-qwq'),
    'internlm2': ParserNames('internlm2', None),
    'internlm2-chat': ParserNames('internlm2', None),
    'internlm3': ParserNames('internlm3', None),
    'internvl2_5': ParserNames('internlm2', None),
    'llama3_1': ParserNames('llama3_1', None),
    'llama3_2': ParserNames('llama3_2', None),
    'deepseek-r1': ParserNames(None, 'deepseek-r1'),
}
"""The named templates that render tools or reasoning."""

OTHER_CALLS = ('<parameter=', '<arg_key>')
"""Of templates whose calls inside ``<tool_call>`` are not JSON."""


def tool_parser(name: str, *, new_id: Callable[[], str] = new_call_id,
                names: Collection[str] | None = None) -> ToolParser:
    """A new tool parser, for one answer.

    Args:
        name: as registered in :data:`TOOL_PARSERS`.
        new_id: makes the ids of calls.
        names: the functions that the request offers.

    Raises:
        ConfigError: LMD-221, there is no such parser.
    """
    make = TOOL_PARSERS.get(name)
    if make is None:
        raise ConfigError('LMD-221', field='tool_call_parser', value=name,
                          choices=', '.join(sorted(TOOL_PARSERS.module_dict)))
    return make(new_id=new_id, names=names)


def reasoning_parser(name: str, *, prompt_end: str = '', enable_thinking: bool | None = None) -> ReasoningParser:
    """A new reasoning parser, for one answer.

    Args:
        name: as registered in :data:`REASONING_PARSERS`.
        prompt_end: the last characters of the rendered prompt, at least the template's own behind the last message:
            a tag there tells where the answer begins, whatever else is said.
        enable_thinking: what the request says; False: an answer whose prompt has no tag does not begin inside.

    Raises:
        ConfigError: LMD-221, there is no such parser.
    """
    make = REASONING_PARSERS.get(name)
    if make is None:
        raise ConfigError('LMD-221', field='reasoning_parser', value=name,
                          choices=', '.join(sorted(REASONING_PARSERS.module_dict)))
    end = prompt_end.rstrip()
    inside = True if end.endswith(OPEN) else False if end.endswith(CLOSE) or enable_thinking is False else None
    return make(inside=inside)


def for_template(template_name: str, jinja_source: str | None = None) -> ParserNames:
    """The parsers that a model's template calls for.

    Args:
        template_name: the registered name, or ``'hf'``.
        jinja_source: the text of the model's own template; it decides, if there is one.
    """
    if not jinja_source:
        return BY_TEMPLATE.get(template_name, ParserNames(None, None))
    return ParserNames(_tools_of(jinja_source), _reasoning_of(jinja_source))


def _tools_of(source: str) -> str | None:
    if '<|plugin|>' in source:
        return 'internlm'
    if '<tool_call>' in source:
        return None if any(mark in source for mark in OTHER_CALLS) else 'qwen'
    if '<|python_tag|>' in source or ('<|start_header_id|>' in source and '"parameters": ' in source):
        return 'llama3'
    return None


def _reasoning_of(source: str) -> str | None:
    if CLOSE not in source:
        return None
    if '<｜Assistant｜>' in source:
        return 'deepseek-v3' if 'thinking' in source else 'deepseek-r1'
    if 'enable_thinking' in source:
        return 'qwen3'
    return 'qwen-qwq' if '<|im_start|>' in source and f'assistant\\n{OPEN}' in source else 'default'
