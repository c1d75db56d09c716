"""Between bodies and the engine's terms; pure: nothing here waits, counts or sends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy.frontend.prompts import Prompt
from lmdeploy.grammar.tools import named_call, required_calls
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.generation import Usage, Work
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.openai.answers import CachedTokens, ReasoningTokens, TokenLogprob, TopLogprob, UsageInfo
from lmdeploy.serve.openai.protocol import (
    AllowedToolsChoice,
    ChatRequest,
    CompletionRequest,
    Message,
    NamedTool,
    Sampling,
    Tool,
)
from lmdeploy.serve.parsers import (
    AnswerParser,
    NamedCall,
    ParserNames,
    RequiredCalls,
    reasoning_parser,
    tool_parser,
)
from lmdeploy.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has not."""
PROMPT_END = 32  # tokens of a prompt's end that tell whether it has opened the reasoning


def stop_texts(stop: str | list[str] | None, limits: Limits, param: str = 'stop') -> list[str] | None:
    """The stop texts of a request; ``param`` is the name of its field.

    Raises:
        HttpError: LMD-512, too many, too long, or empty.
    """
    if stop is None:
        return None
    texts = [stop] if isinstance(stop, str) else stop
    limits.check('stop', texts, param)
    for text in texts:
        limits.check('stop_chars', text, param)
        if not text:
            raise HttpError('LMD-512', param=param, reason='a stop text cannot be empty')
    return texts or None


def stop_ids(ids: list[int] | None, limits: Limits) -> list[int] | None:
    limits.check('stop_token_ids', ids or (), 'stop_token_ids')
    return ids or None


def logit_bias(given: dict[str, float] | None, limits: Limits) -> dict[int, float] | None:
    """Keys of JSON objects are texts: here they become token ids."""
    if not given:
        return None
    limits.check('logit_bias', given, 'logit_bias')
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise HttpError('LMD-512', param='logit_bias', reason='its keys must be token ids')
    return {int(key): value for key, value in given.items()}


def or_default(value: Any, default: Any) -> Any:
    """``null`` means the default, as if the field were not there."""
    return default if value is None else value


def sampling(body: Sampling, limits: Limits, *, max_new_tokens: int | None, logprobs: int | None) -> GenerationConfig:
    """The parameters that chat and completions share. The server samples, unless the temperature is 0."""
    limits.check('n', body.n or 1, 'n')
    limits.check('max_tokens', max_new_tokens or 0, 'max_tokens')
    limits.check('logprobs', logprobs or 0, 'logprobs')
    limits.check('name_chars', body.user or '', 'user')
    if body.stream_options is not None and not body.stream:
        raise HttpError('LMD-512', param='stream_options', reason='it needs stream to be true')
    return GenerationConfig(
        do_sample=True,
        n=or_default(body.n, 1),
        max_new_tokens=max_new_tokens,
        temperature=or_default(body.temperature, 0.7),
        top_p=or_default(body.top_p, 1.0),
        top_k=or_default(body.top_k, 40),
        min_p=or_default(body.min_p, 0.0),
        repetition_penalty=or_default(body.repetition_penalty, 1.0),
        presence_penalty=or_default(body.presence_penalty, 0.0),
        frequency_penalty=or_default(body.frequency_penalty, 0.0),
        random_seed=body.seed,
        stop_words=stop_texts(body.stop, limits),
        stop_token_ids=stop_ids(body.stop_token_ids, limits),
        logit_bias=logit_bias(body.logit_bias, limits),
        logprobs=logprobs,
        ignore_eos=or_default(body.ignore_eos, False),
        min_new_tokens=body.min_new_tokens,
        skip_special_tokens=or_default(body.skip_special_tokens, True),
        spaces_between_special_tokens=or_default(body.spaces_between_special_tokens, True),
        include_stop_str_in_output=or_default(body.include_stop_str_in_output, False),
        response_format=body.response_format,
    )


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request, ready to run, and how its answers are read.

    Attributes:
        required: the answer is a list of calls; ``named``: the arguments of a call of this function.
        tool_names: the functions that may be called.
        parsers: the parsers by name, as far as this request wants them.
        most_calls: how many calls an answer may have; None: any number.
    """

    work: Work
    parsers: ParserNames
    tool_names: tuple[str, ...] = ()
    required: bool = False
    named: str | None = None
    most_calls: int | None = None

    def parser(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> AnswerParser | None:
        """Reads one answer to ``prompt``; None: the answer is all content."""
        if self.named is not None:
            return AnswerParser(None, NamedCall(self.named))
        if self.required:
            return AnswerParser(None, RequiredCalls())
        if self.parsers == (None, None):
            return None
        end = tokenizer.decode(list(prompt[-PROMPT_END:]), skip_special_tokens=False)
        return AnswerParser(
            self.parsers.reasoning and reasoning_parser(self.parsers.reasoning, prompt_end=end,
                                                        enable_thinking=self.work.enable_thinking) or None,
            self.parsers.tools and tool_parser(self.parsers.tools, names=self.tool_names) or None,
            self.most_calls)


def chat_plan(body: ChatRequest, limits: Limits, parsers: ParserNames) -> ChatPlan:
    """What a chat request asks for.

    Args:
        parsers: those that fit the model.

    Raises:
        HttpError: LMD-512, LMD-513.
    """
    if body.top_logprobs and not body.logprobs:  # LMDeploy's client always sends a 0
        raise HttpError('LMD-512', param='top_logprobs', reason='it needs logprobs to be true')
    gen = sampling(body, limits, max_new_tokens=or_default(body.max_completion_tokens, body.max_tokens),
                   logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    prompt = _chat_prompt(body, limits)
    tools, choice = _tools(body, limits)
    parallel = or_default(body.parallel_tool_calls, True)
    if prompt.messages is None:
        if tools:
            raise HttpError('LMD-513', param='tools', reason='a prompt without messages has no place for them')
        return ChatPlan(Work(prompt, gen, do_preprocess=False), ParserNames(None, None))
    forced = choice == 'required' or isinstance(choice, NamedTool)
    thinking = body.enable_thinking
    if thinking is None and body.reasoning_effort is not None:
        thinking = body.reasoning_effort not in ('none', 'minimal')
    if forced:
        if gen.response_format is not None:
            raise HttpError('LMD-512', param='response_format', reason='a forced tool call has a form of its own')
        thinking = False  # the answer is the call, from its first token
        gen.response_format = (named_call(tools, choice.function.name) if isinstance(choice, NamedTool) else
                               required_calls(tools, parallel=parallel))
    elif tools and parsers.tools is None:
        raise HttpError('LMD-513', param='tools', reason="no parser for tool calls fits this model's chat template; "
                        'the server can name one with --tool-call-parser')
    wanted = ParserNames(parsers.tools if tools and not forced else None, None if forced else parsers.reasoning)
    if wanted != (None, None):  # the marks of calls and reasoning may be control tokens
        gen.skip_special_tokens = gen.spaces_between_special_tokens = False
    values = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        values.setdefault('reasoning_effort', body.reasoning_effort)
    work = Work(prompt, gen, tools=tools or None, enable_thinking=thinking, chat_template_kwargs=values or None)
    return ChatPlan(work, wanted, tuple(tool['function']['name'] for tool in tools), choice == 'required',
                    choice.function.name if isinstance(choice, NamedTool) else None, None if parallel else 1)


def _chat_prompt(body: ChatRequest, limits: Limits) -> Prompt:
    if body.input_ids is not None:
        if body.messages:
            raise HttpError('LMD-512', param='input_ids', reason='give either messages or input_ids')
        return Prompt(token_ids=body.input_ids)
    if isinstance(body.messages, str):
        return Prompt(text=body.messages)
    return Prompt(messages=messages(body.messages, limits))


def messages(given: Sequence[Message], limits: Limits) -> list[dict[str, Any]]:
    """A conversation as plain dicts, without the keys that are null.

    Raises:
        HttpError: LMD-512.
    """
    if not given:
        raise HttpError('LMD-512', param='messages', reason='there is no message')
    limits.check('messages', given, 'messages')
    found = []
    for message in given:
        plain = message.model_dump(exclude_none=True)
        plain.setdefault('content', None)
        found.append(plain)
    return found


def _tools(body: ChatRequest, limits: Limits) -> tuple[list[dict[str, Any]], Any]:
    """The tools that the model sees, and the choice among them: None (none), 'auto', 'required' or a NamedTool."""
    choice: Any = body.tool_choice or 'auto'
    if not body.tools:
        if choice not in ('auto', 'none'):
            raise HttpError('LMD-512', param='tool_choice', reason='there are no tools to choose from')
        return [], None
    tools = plain_tools(body.tools, limits)
    names = [tool['function']['name'] for tool in tools]
    if len(set(names)) < len(names):
        raise HttpError('LMD-512', param='tools', reason='two functions have the same name')
    if choice == 'none':
        return [], None
    if isinstance(choice, AllowedToolsChoice):
        allowed = {tool.function.name for tool in choice.allowed_tools.tools}
        if not allowed <= set(names) or not allowed:
            raise HttpError('LMD-512', param='tool_choice', reason='it allows a tool that is not among tools')
        return [tool for tool in tools if tool['function']['name'] in allowed], choice.allowed_tools.mode
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise HttpError('LMD-512', param='tool_choice', reason='it names a function that is not among tools')
    return tools, choice


def plain_tools(tools: Sequence[Tool], limits: Limits) -> list[dict[str, Any]]:
    """Tools as plain dicts."""
    limits.check('tools', tools, 'tools')
    plain = [tool.model_dump(exclude_none=True) for tool in tools]
    limits.check('tool_bytes', len(json.dumps(plain, ensure_ascii=False)), 'tools')
    return plain


def completion_works(body: CompletionRequest, limits: Limits) -> list[Work]:
    """One work per prompt.

    Raises:
        HttpError: LMD-512.
    """
    if body.echo and body.logprobs is not None:
        raise HttpError('LMD-513', param='echo', reason='the tokens of the prompt have no log-probabilities here')
    gen = sampling(body, limits, max_new_tokens=or_default(body.max_tokens, 16), logprobs=body.logprobs)
    return [Work(prompt, gen, do_preprocess=False) for prompt in raw_prompts(body.prompt, limits, 'prompt')]


def raw_prompts(given: str | list[str] | list[int] | list[list[int]], limits: Limits, param: str) -> list[Prompt]:
    """One prompt, or a list of them; each a text or a list of tokens."""
    entries: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not entries:
        raise HttpError('LMD-512', param=param, reason='there is no prompt')
    limits.check('prompts', entries, param)
    return [Prompt(text=entry) if isinstance(entry, str) else Prompt(token_ids=entry) for entry in entries]


def usage_info(usage: Usage) -> UsageInfo:
    return UsageInfo(usage.prompt, usage.generated, usage.prompt + usage.generated, CachedTokens(usage.cached),
                     ReasoningTokens(usage.reasoning))


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def ranked(logprobs: dict[int, float], most: int) -> list[tuple[int, float]]:
    """The ``most`` best of the tokens that one position tells of: these are the sampled one and the best."""
    return sorted(logprobs.items(), key=lambda item: -item[1])[:most]


def token_logprob(tokenizer: Tokenizer, logprobs: dict[int, float], most: int) -> TokenLogprob:
    """One generated token in OpenAI's form."""
    token, value = next(iter(logprobs.items()))
    best = []
    for other, logprob in ranked(logprobs, most):
        raw = tokenizer.token_bytes(other)
        best.append(TopLogprob(raw.decode('utf-8', 'replace'), list(raw), finite(logprob)))
    raw = tokenizer.token_bytes(token)
    return TokenLogprob(raw.decode('utf-8', 'replace'), list(raw), finite(value), best)
