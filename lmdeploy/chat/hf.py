"""The model's own jinja template: compiled once, tried at once, rendered in the sandbox."""

from __future__ import annotations

import threading
from typing import Any

from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import TemplateError as JinjaError

from lmdeploy.chat.base import BaseModel
from lmdeploy.chat.budget import OUTPUT_CHARS, Budget, LimitExceeded, running
from lmdeploy.chat.filters import Refused
from lmdeploy.chat.messages import ROLES, call_arguments, check_messages, get_text, plain
from lmdeploy.chat.sandbox import Sandbox
from lmdeploy.errors import RequestError, TemplateError

MAX_SOURCE = 1 << 19
MAX_EXTRA = 16
RESERVED = ('messages', 'tools', 'add_generation_prompt', 'tokenize', 'chat_template', 'documents', 'bos_token',
            'eos_token', 'continue_final_message')
FAILURES = (JinjaError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
            MemoryError, AssertionError)
END_OF_PREFILL = '\U000FFFFD'  # private use, plane 15: stands behind the text that the model continues
REASONING = ('reasoning_content', 'thinking', 'reasoning')
MARK = 'PROBE7'


class HFChatTemplate(BaseModel):
    """A jinja template as Hugging Face tokenizers and GGUF files carry it.

    It is tried at once on a small conversation, which tells whether it works at all, whether it wants contents as
    text or as lists of parts, and whether it wants the arguments of tool calls as objects or as JSON text.

    Args:
        chat_template: the jinja source.
        special_tokens: ``bos_token`` and ``eos_token`` (and others) as the template may name them.
        source: what the template belongs to, for messages.
        stop_words: texts that end an answer.

    Raises:
        TemplateError: LMD-172 (does not compile), LMD-173 (does what templates may not), LMD-174 (takes too long),
            LMD-178 (fails on the small conversation).
    """

    def __init__(self, chat_template: str, special_tokens: dict[str, str] | None = None, source: str = 'the model',
                 stop_words: list[str] | None = None) -> None:
        super().__init__(stop_words=stop_words)
        self.source = source
        self.text = chat_template
        self.special_tokens = dict(special_tokens or {})
        self._template: Any = self._compile(chat_template)
        self._probe()

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        return self.messages2prompt([{'role': 'user', 'content': prompt}], sequence_start)

    def messages2prompt(self, messages: str | list[dict], sequence_start: bool = True,
                        tools: list[dict] | None = None, enable_thinking: bool | None = None,
                        chat_template_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> str:
        """The text of a conversation, as ``apply_chat_template`` of the model's tokenizer gives it.

        If the last message is the assistant's, the text ends behind its content. With ``sequence_start=False`` it is
        what these messages add to a conversation that has one turn already.

        Raises:
            RequestError: LMD-175/176 (messages), LMD-177 (the template refuses them), LMD-178 (it fails on them),
                LMD-179 (chat_template_kwargs), LMD-181 (an answer cannot be continued).
            TemplateError: LMD-173, LMD-174.
        """
        if isinstance(messages, str):
            return self.get_prompt(messages, sequence_start)
        messages = self.prepare(check_messages(messages))
        self._check_roles(messages)
        options: dict[str, Any] = dict(check_extra(chat_template_kwargs))
        if enable_thinking is not None:
            options['enable_thinking'] = enable_thinking
        options['tools'] = plain(tools) if tools else None
        if sequence_start:
            return self._conversation(messages, options)
        earlier = [{'role': 'user', 'content': MARK}, {'role': 'assistant', 'content': MARK}]
        before = self._render(self._shape(earlier), add_generation_prompt=False, **options)
        text = self._conversation(self._shape(earlier) + messages, options)
        same = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), min(len(before), len(text)))
        return text[same:]

    def prepare(self, messages: list[dict]) -> list[dict]:
        """Contents and tool calls in the shapes that the template wants."""
        return self._shape([_with_reasoning(self._with_calls(message)) for message in messages])

    def _conversation(self, messages: list[dict], options: dict[str, Any]) -> str:
        last = messages[-1]
        if last['role'] != 'assistant' or last.get('tool_calls'):
            return self._render(messages, add_generation_prompt=True, **options)
        content = last['content']
        if isinstance(content, list):
            content = [*content[:-1], {**content[-1], 'text': content[-1]['text'] + END_OF_PREFILL}] if content else []
        else:
            content = content + END_OF_PREFILL
        text = self._render([*messages[:-1], {**last, 'content': content}], add_generation_prompt=False, **options)
        end = text.rfind(END_OF_PREFILL)
        if end < 0:
            raise RequestError('LMD-181', source=self.source)
        return text[:end]

    def _shape(self, messages: list[dict]) -> list[dict]:
        if self.wants_parts:
            return [{**m, 'content': [{'type': 'text', 'text': m['content']}]} if isinstance(m['content'], str) else m
                    for m in messages]
        return [{**m, 'content': get_text(m['content'])} for m in messages]

    def _with_calls(self, message: dict) -> dict:
        if not message.get('tool_calls') or not self.wants_objects:
            return message
        calls = []
        for call in message['tool_calls']:
            inner = call.get('function')
            if isinstance(inner, dict):
                calls.append({**call, 'function': {**inner, 'arguments': call_arguments(inner)}})
            else:
                calls.append({**call, 'arguments': call_arguments(call)} if 'arguments' in call else call)
        return {**message, 'tool_calls': calls}

    def _check_roles(self, messages: list[dict]) -> None:
        for index, message in enumerate(messages):
            role = message['role']
            known = role in ROLES or (role.isidentifier() and (f"'{role}'" in self.text or f'"{role}"' in self.text))
            if not known:
                raise RequestError('LMD-176', index=index, role=role, roles=', '.join(ROLES))

    # Compiling and rendering.

    def _compile(self, source: str) -> Any:
        if len(source) > MAX_SOURCE:
            raise TemplateError('LMD-172', source=self.source, line=1,
                                reason=f'it has {len(source):,} characters, more than {MAX_SOURCE:,}')
        try:
            return _sandbox().compile_checked(source)
        except TemplateSyntaxError as error:
            raise TemplateError('LMD-172', source=self.source, line=error.lineno, reason=error.message) from error
        except SecurityError as error:
            raise TemplateError('LMD-173', source=self.source, line=getattr(error, 'lineno', 0),
                                reason=error.message) from error
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            reason = f'it is nested too deeply or malformed ({type(error).__name__})'
            raise TemplateError('LMD-172', source=self.source, line=0, reason=reason) from error

    def _render(self, messages: list[dict], **variables: Any) -> str:
        variables = {**self.special_tokens, 'documents': None, **variables, 'messages': messages}
        pieces: list[str] = []
        chars = 0
        try:
            with running(Budget()) as budget:
                for piece in self._template.root_render_func(self._template.new_context(variables)):
                    chars += len(piece)
                    if chars > OUTPUT_CHARS:
                        raise LimitExceeded(f'{OUTPUT_CHARS >> 20} Mi characters of output')
                    budget.spend()
                    pieces.append(piece)
        except LimitExceeded as error:
            raise TemplateError('LMD-174', source=self.source, line=self._line(error), limit=str(error)) from error
        except SecurityError as error:
            raise TemplateError('LMD-173', source=self.source, line=self._line(error),
                                reason=error.message) from error
        except Refused as error:
            raise RequestError('LMD-177', message=error.message) from error
        except FAILURES as error:
            raise RequestError('LMD-178', source=self.source, line=self._line(error), reason=_reason(error)) from error
        return ''.join(pieces)

    def _line(self, error: BaseException) -> int:
        """The template's line where an error was raised; 0 if it was not raised inside."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            template = trace.tb_frame.f_globals.get('__jinja_template__')  # set by jinja2 in compiled templates
            if template is not None and template is self._template:
                line = template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return line

    # The first try.

    def _probe(self) -> None:
        user = {'role': 'user', 'content': MARK}
        system = {'role': 'system', 'content': MARK}
        self.wants_parts = False
        self.wants_objects = True
        text, error = self._first([[user], [system, user]])
        if text is None or MARK not in text:
            self.wants_parts = True
            parts_text, _ = self._first([self._shape([user]), self._shape([system, user])])
            if parts_text is None or MARK not in parts_text:
                if text is None:
                    raise TemplateError('LMD-178', **error) from None
                self.wants_parts = False  # it shows no content at all: the text form is as good as any
        if 'tool_calls' in self.text:
            self.wants_objects = self._takes_objects()

    def _first(self, conversations: list[list[dict]]) -> tuple[str | None, dict[str, Any]]:
        """The first conversation that can be rendered; else why the first one could not."""
        reasons: dict[str, Any] = {}
        for conversation in conversations:
            try:
                return self._render(conversation, add_generation_prompt=True, tools=None), reasons
            except RequestError as error:
                reason = str(error.params.get('reason', error.params.get('message')))
                reasons = reasons or {'source': self.source, 'line': error.params.get('line', 0), 'reason': reason}
        return None, reasons

    def _takes_objects(self) -> bool:
        """Whether arguments given as an object come out as JSON."""
        call = {'id': 'call00000', 'type': 'function', 'function': {'name': 'f', 'arguments': {'city': MARK}}}
        talk = self._shape([{'role': 'user', 'content': MARK}, {'role': 'assistant', 'content': ''}])
        talk[-1]['tool_calls'] = [call]
        try:
            text = self._render(talk, add_generation_prompt=False, tools=None)
        except RequestError:
            call['function'] = {'name': 'f', 'arguments': '{"city": "x"}'}
            try:
                self._render(talk, add_generation_prompt=False, tools=None)
            except RequestError:
                return True  # it refuses such a conversation in either form
            return False
        return f"{{'city': '{MARK}'}}" not in text


def _with_reasoning(message: dict) -> dict:
    """The reasoning of an old answer under the names that templates read, whichever the client used."""
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {'thinking': reasoning, **message, 'reasoning_content': reasoning}


def check_extra(extra: dict[str, Any] | None) -> dict[str, Any]:
    """Values that a request may hand to the template.

    Raises:
        RequestError: LMD-179, not a dict of at most 16 plain values, or names that are not free.
    """
    def bad(reason: str) -> RequestError:
        return RequestError('LMD-179', reason=reason, most=MAX_EXTRA, reserved=', '.join(RESERVED))

    if extra is None:
        return {}
    if not isinstance(extra, dict):
        raise bad(f'they are a {type(extra).__name__}, not an object')
    if len(extra) > MAX_EXTRA:
        raise bad(f'there are {len(extra)} of them')
    for name, value in extra.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith('_'):
            raise bad(f'{name!r} is not a name')
        if name in RESERVED or name in _sandbox().globals:
            raise bad(f'{name!r} is taken')
        if value is not None and not isinstance(value, (str, int, float, bool)):
            raise bad(f'{name} is a {type(value).__name__}')
    return plain(extra)


def _reason(error: Exception) -> str:
    text = error.message if isinstance(error, (JinjaError, UndefinedError)) and error.message else str(error)
    return f'{text or type(error).__name__}'[:500]


_lock = threading.Lock()
_environment: Sandbox | None = None


def _sandbox() -> Sandbox:
    """The one environment; it holds no state of any rendering."""
    global _environment
    with _lock:
        if _environment is None:
            _environment = Sandbox()
        return _environment

