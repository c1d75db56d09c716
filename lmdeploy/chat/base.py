"""Chat templates made of boxes: the text before and after the message of each role."""

from __future__ import annotations

from typing import Any

from lmdeploy.chat.messages import Segment as Segment
from lmdeploy.chat.messages import get_text
from lmdeploy.errors import ConfigError, RequestError

CAPABILITIES = ('completion', 'infilling', 'chat', 'python', 'voice')


class BaseModel:
    """What every chat template is: something that turns a prompt or a conversation into a text.

    Args:
        capability: ``'chat'`` puts boxes around prompts; the others hand raw prompts to the model.
        stop_words: texts that end an answer.
        kwargs: accepted and ignored, so that a subclass may pass on what it was given.

    Raises:
        ConfigError: LMD-182, an unknown capability.
    """

    def __init__(self, capability: str = 'chat', stop_words: list[str] | None = None, **kwargs: Any) -> None:
        if capability not in CAPABILITIES:
            raise ConfigError('LMD-182', field='capability', value=capability, choices=', '.join(CAPABILITIES))
        self.capability = capability
        self.stop_words = stop_words

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        """The text for one user prompt; here, the prompt as it is."""
        return prompt

    def messages2prompt(self, messages: str | list[dict], sequence_start: bool = True, **kwargs: Any) -> str:
        """The text for a conversation; here, that of its messages one after the other."""
        if isinstance(messages, str):
            return self.get_prompt(messages, sequence_start)
        return self.get_prompt(''.join(get_text(m.get('content')) for m in messages), sequence_start)

    def prepare(self, messages: list[dict]) -> list[dict]:
        """Checked messages in the shape that this template wants, before control tokens are exchanged in them."""
        return messages

    @classmethod
    def match(cls, model_path: str) -> str | None:
        """The registered name of the template if it is made for the model at ``model_path``."""
        return None


class BaseChatTemplate(BaseModel):
    """A template of boxes.

    Whose text is trusted: the boxes are the operator's, so control tokens in them act; message contents, names and
    tool results are somebody else's and stay text. That holds for subclasses too, also if they override
    :meth:`get_prompt` or :meth:`messages2prompt` and return one plain text: before they are called, control tokens in
    their input are exchanged for one-character stand-ins, which are found again in what they return. With a
    ``capability`` other than ``'chat'`` the prompt is the operator's own text and fully trusted.

    Args:
        system, meta_instruction, eosys: before, the default text of, and after a system message. A
            ``meta_instruction`` of None means no system message by default.
        user, eoh: before and after a user message.
        assistant, eoa: before and after an answer.
        separator: between an answer and the next turn.
        tool, eotool: before and after a tool result.
        capability, stop_words: see :class:`BaseModel`.
    """

    def __init__(self, system: str = '', meta_instruction: str | None = '', eosys: str = '', user: str = '',
                 eoh: str = '', assistant: str = '', eoa: str = '', separator: str = '', tool: str = '',
                 eotool: str = '', capability: str = 'chat', stop_words: list[str] | None = None,
                 **kwargs: Any) -> None:
        super().__init__(capability=capability, stop_words=stop_words, **kwargs)
        self.system = system
        self.meta_instruction = meta_instruction
        self.eosys = eosys
        self.user = user
        self.eoh = eoh
        self.assistant = assistant
        self.eoa = eoa
        self.separator = separator
        self.tool = tool
        self.eotool = eotool

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        """The text of one user turn, ending where the answer begins.

        Args:
            prompt: the user's text.
            sequence_start: True: the conversation begins here (with the default system message, if any); False: the
                text goes on behind an answer.
        """
        if self.capability != 'chat':
            return prompt
        return self._start(sequence_start, default_system=True) + self.user + prompt + self.eoh + self.opener(None)

    def messages2prompt(self, messages: str | list[dict], sequence_start: bool = True,
                        tools: list[dict] | None = None, enable_thinking: bool | None = None,
                        **kwargs: Any) -> str:
        """The text of a conversation, ending where the answer begins.

        If the last message is the assistant's, the text ends behind its content: the model goes on with it.

        Args:
            messages: a user's text, or OpenAI-style messages.
            sequence_start: see :meth:`get_prompt`.
            tools: OpenAI-style tool descriptions; templates without a tool format leave them out.
            enable_thinking: whether the model may reason first, for templates that can say so.

        Raises:
            RequestError: LMD-176, a role that has no box.
        """
        if isinstance(messages, str):
            return self.get_prompt(messages, sequence_start)
        if self.capability != 'chat':
            return self.get_prompt(''.join(get_text(m.get('content')) for m in messages), sequence_start)
        messages = self.rewrite(list(messages), tools, sequence_start)
        has_system = bool(messages) and messages[0]['role'] in ('system', 'developer')
        parts = [self._start(sequence_start, default_system=not has_system)]
        boxes = self.boxes()
        prefill = bool(messages) and messages[-1]['role'] == 'assistant'
        for index, message in enumerate(messages):
            role = message['role']
            if role not in boxes:
                raise RequestError('LMD-176', index=index, role=role, roles=', '.join(boxes))
            before, after = boxes[role]
            if prefill and index == len(messages) - 1:
                after = ''
            parts += [self.named(before, message), get_text(message.get('content')), after]
        if not prefill:
            parts.append(self.opener(enable_thinking))
        return ''.join(parts)

    def _start(self, sequence_start: bool, default_system: bool) -> str:
        if not sequence_start:
            return self.separator
        if not default_system:
            return self.begin()
        if self.meta_instruction is None:
            return self.begin() + self.bare()
        return self.begin() + self.system + self.meta_instruction + self.eosys

    # What named templates change: each is one fact of a format.

    def begin(self) -> str:
        """The text that opens every sequence."""
        return ''

    def bare(self) -> str:
        """The text that stands in the place of a system message where there is none."""
        return ''

    def opener(self, enable_thinking: bool | None) -> str:
        """The text that asks for an answer."""
        return self.assistant

    def boxes(self) -> dict[str, tuple[str, str]]:
        """Role to the texts before and after its messages."""
        return {'system': (self.system, self.eosys), 'developer': (self.system, self.eosys),
                'user': (self.user, self.eoh), 'assistant': (self.assistant, self.eoa + self.separator),
                'tool': (self.tool, self.eotool)}

    def named(self, before: str, message: dict) -> str:
        """The text before a message, told the message (which may carry a name)."""
        return before

    def rewrite(self, messages: list[dict], tools: list[dict] | None, sequence_start: bool) -> list[dict]:
        """Messages as the boxes expect them: tool calls and tool descriptions turned into text."""
        return messages
