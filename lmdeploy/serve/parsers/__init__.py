"""An answer's text, piece by piece, into reasoning, content and tool calls.

What the model writes is not trusted: the parsers are state machines written by hand that look at each character once,
never raise, and run no regular expression or evaluator over it. Everything they do depends on the text alone, never
on how it was cut into pieces.

==================  ========================================================  ======================================
tool parser         form                                                      names
==================  ========================================================  ======================================
``QwenTools``       ``<tool_call>{"name", "arguments"}</tool_call>``, or      qwen, qwen2d5, qwen3, hermes
                    that object, bare or as a block of JSON code, at the
                    beginning of an answer
``InternLMTools``   ``<|action_start|><|plugin|>{"name", "parameters"}        internlm, internlm2, internlm3,
                    <|action_end|>``                                          intern-s1
``Llama3Tools``     ``<|python_tag|>{"name", "parameters"}``,                 llama3, llama3_1, llama3_2
                    ``<function=NAME>{...}</function>``, or the object at
                    the beginning of an answer, as above
``RequiredCalls``   ``[{"name", "parameters" or "arguments"}, ...]``          (``tool_choice='required'``)
``NamedCall``       ``{...}``, the arguments of a known function              (``tool_choice`` names a function)
==================  ========================================================  ======================================

Further calls may follow an object of a call, directly or behind ``;`` (Qwen, Llama 3). Calls are at most 64 levels
deep, their arguments at most 262,144 characters long.

====================  ======================================
tool parser         form                                                      names
==================  ========================================================  ======================================
``QwenTools``       ``<tool_call>{"name", "arguments"}</tool_call>``          qwen, qwen2d5, qwen3, hermes
``InternLMTools``   ``<|action_start|><|plugin|>{"name", "parameters"}        internlm, internlm2, internlm3,
                    <|action_end|>``                                          intern-s1
``Llama3Tools``     ``<|python_tag|>{"name", "parameters"}``,                 llama3, llama3_1, llama3_2
                    ``<function=NAME>{...}</function>``, or the bare
                    ``{"name", "parameters"}`` that begins an answer
``RequiredCalls``   ``[{"name", "parameters" or "arguments"}, ...]``          (``tool_choice='required'``)
``NamedCall``       ``{...}``, the arguments of a known function              (``tool_choice`` names a function)
==================  ========================================================  ======================================

====================  ===================================================  ===================================
reasoning parser      where the answer begins, if its prompt does not say  names
====================  ===================================================  ===================================
``ThinkParser``       in the content; ``<think>`` may open it              default, qwen3, deepseek-v3,
                                                                           intern-s1
``ThinkParser``       inside the reasoning                                 deepseek-r1, qwen-qwq
====================  ===================================================  ===================================

When a call counts: as soon as its name and the ``{`` of its arguments have been read, it is announced, and its
arguments are passed on as they come. Text that goes wrong before that point is content, character for character. A
call that goes wrong later cannot be taken back from a client that reads along: it ends there, marked incomplete, and
the text goes on as content from the character that does not fit.
"""

from __future__ import annotations

from lmdeploy.serve.parsers.answer import Answer, AnswerParser, ToolCall, collect
from lmdeploy.serve.parsers.base import CallArguments, CallEnd, CallStart, Content, Event, Reasoning, new_call_id
from lmdeploy.serve.parsers.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    ParserNames,
    for_template,
    reasoning_parser,
    tool_parser,
)
from lmdeploy.serve.parsers.tools.forced import NamedCall, RequiredCalls

__all__ = ['REASONING_PARSERS', 'TOOL_PARSERS', 'Answer', 'AnswerParser', 'CallArguments', 'CallEnd', 'CallStart',
           'Content', 'Event', 'NamedCall', 'ParserNames', 'Reasoning', 'RequiredCalls', 'ToolCall', 'collect',
           'for_template', 'new_call_id', 'reasoning_parser', 'tool_parser']
