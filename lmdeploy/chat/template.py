"""ChatTemplate: what the frontend sees of a chat template, whichever kind it is."""

from __future__ import annotations

import inspect
from typing import Any

from lmdeploy.chat.base import BaseModel
from lmdeploy.chat.messages import Segment, check_messages, plain
from lmdeploy.chat.trust import ControlStrings, Cover, render_apart
from lmdeploy.errors import RequestError
from lmdeploy.log import get_logger

OPTIONS = ('tools', 'enable_thinking', 'chat_template_kwargs')


class ChatTemplate:
    """Renders conversations to (text, trusted) segments.

    The template's own text is trusted. Message contents of every role, names, tool descriptions, tool calls and tool
    results are not: a control token spelled out there stays text. A raw prompt, which is what a template with another
    ``capability`` than ``'chat'`` renders, is the operator's own text and trusted as a whole; so is a prompt that does
    not go through a template at all.

    Args:
        name: the registered name, or ``'hf'`` for the model's own.
        model: the template.
        strings: the control strings of the model's tokenizer.
        add_bos: whether the tokenizer puts its bos token in front, if it has the habit. Jinja templates write it
            themselves where the model wants it.
    """

    def __init__(self, name: str, model: BaseModel, strings: ControlStrings, add_bos: bool) -> None:
        self.name = name
        self.model = model
        self.strings = strings
        self.add_bos = add_bos
        self.stop_words: list[str] = list(model.stop_words or ())
        self._options = _accepted(model)

    @property
    def raw(self) -> bool:
        """Whether prompts go to the model as they are."""
        return self.model.capability != 'chat'

    def render(self, messages: list[dict[str, Any]], *, sequence_start: bool = True,
               tools: list[dict[str, Any]] | None = None, enable_thinking: bool | None = None,
               chat_template_kwargs: dict[str, Any] | None = None) -> list[Segment]:
        """A conversation as segments, ending where the answer begins (or goes on, if the last message is one).

        Args:
            messages: OpenAI-style messages.
            sequence_start: False: the text goes on behind an answer.
            tools: OpenAI-style tool descriptions.
            enable_thinking: whether the model may reason first; None leaves it to the template.
            chat_template_kwargs: further values for the model's own template.

        Raises:
            RequestError: LMD-175 and following, the conversation is not usable.
            TemplateError: LMD-173, LMD-174.
        """
        checked = self.model.prepare(check_messages(messages))
        tools = _check_tools(tools)

        def render(cover: Cover) -> str:
            options = {'tools': cover.value(tools), 'enable_thinking': enable_thinking,
                       'chat_template_kwargs': cover.value(plain(chat_template_kwargs))}
            return self.model.messages2prompt(cover.messages(checked), sequence_start, **self._given(options))

        if self.raw:
            options = {'tools': tools, 'enable_thinking': enable_thinking,
                       'chat_template_kwargs': chat_template_kwargs}
            return [Segment(self.model.messages2prompt(checked, sequence_start, **self._given(options)), True)]
        return render_apart(self.strings, render)

    def render_prompt(self, prompt: str, sequence_start: bool = True) -> list[Segment]:
        """One user prompt as segments (``get_prompt`` of the template)."""
        if self.raw:
            return [Segment(self.model.get_prompt(prompt, sequence_start), True)]
        return render_apart(self.strings, lambda cover: self.model.get_prompt(cover.text(prompt), sequence_start))

    def _given(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that are set and that the template's method takes: a user's class may know none of them."""
        given = {name: value for name, value in options.items() if value is not None and value != {}}
        unknown = [name for name in given if self._options is not None and name not in self._options]
        if unknown:
            get_logger().debug('the chat template %r does not know %s', self.name, ', '.join(unknown))
        return {name: value for name, value in given.items() if name not in unknown}


def _accepted(model: BaseModel) -> frozenset[str] | None:
    """The options that ``messages2prompt`` of a template takes; None if it takes any."""
    parameters = inspect.signature(model.messages2prompt).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters) & frozenset(OPTIONS)


def _check_tools(tools: Any) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError('LMD-184', given=type(tools).__name__)
    return plain(tools)
