"""A conversation that comes in items, put together as messages.

What the assistant thought, said and called in a row is one message, and every result names the call that it answers.
Texts are joined once, at the end of their message: a conversation of many small items costs no more than its size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.serve.blocks import Block
from lmdeploy.serve.errors import HttpError

Message = dict[str, Any]


@dataclass(slots=True)
class _Draft:
    """A message that may still grow."""

    role: str
    texts: list[str | dict[str, Any]] = field(default_factory=list)  # and pictures, as content parts
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def message(self) -> Message:
        message: Message = {'role': self.role, 'content': _content(self.texts) if self.texts else None}
        if self.thoughts:
            message['reasoning_content'] = '\n'.join(self.thoughts)
        if self.calls:
            message['tool_calls'] = self.calls
        return message


class Turns:
    """Collects messages in the form of OpenAI's chat completions.

    Args:
        before: what was said earlier.
        join: neighbouring texts of one role other than the assistant are one message too.
    """

    def __init__(self, before: Iterable[Message] = (), *, join: bool = False) -> None:
        self._messages = list(before)
        self._join = join
        self._draft: _Draft | None = None
        self._functions = {call['id']: call['function']['name'] for message in self._messages
                           for call in message.get('tool_calls', ())}
        if self._messages and self._messages[-1]['role'] == 'assistant':
            self._draft = _reopen(self._messages.pop())

    @property
    def messages(self) -> list[Message]:
        """All that was said. The last message does not grow any more."""
        self._close()
        return self._messages

    def say(self, role: str, text: str) -> None:
        """Somebody says something."""
        self.put(role, [text])

    def put(self, role: str, said: Iterable[str | dict[str, Any]]) -> None:
        """Somebody says texts and shows pictures, which have the form of content parts."""
        grows = self._draft is not None and self._draft.role == role and (role == 'assistant' or self._join)
        (self._draft if grows and self._draft is not None else self._open(role)).texts.extend(said)

    def think(self, text: str) -> None:
        """The assistant thinks."""
        self._assistant().thoughts.append(text)

    def call(self, call_id: str, name: str, arguments: str, param: str) -> None:
        """The assistant calls a function; ``arguments`` are JSON text.

        Raises:
            HttpError: LMD-512, another call has that id.
        """
        if call_id in self._functions:
            raise HttpError('LMD-512', param=param, reason=f'two calls have the id {call_id[:100]!r}')
        self._functions[call_id] = name
        self._assistant().calls.append(
            {'id': call_id, 'type': 'function', 'function': {'name': name, 'arguments': arguments}})

    def result(self, call_id: str, text: str, param: str) -> None:
        """What a call gave.

        Raises:
            HttpError: LMD-512, there was no such call.
        """
        name = self._functions.get(call_id)
        if name is None:
            raise HttpError('LMD-512', param=param, reason=f'no call before it has the id {call_id[:100]!r}')
        self._close()
        self._messages.append({'role': 'tool', 'tool_call_id': call_id, 'name': name, 'content': text})

    def answer(self, blocks: Iterable[Block]) -> None:
        """What the model has answered. A message of its own that it was to continue goes on with the first text."""
        draft = self._draft
        goes_on = (draft is not None and draft.role == 'assistant' and bool(draft.texts)
                   and isinstance(draft.texts[-1], str))
        for block in blocks:
            if block.kind == 'reasoning':
                self.think(block.text)
            elif block.kind == 'call':
                self.call(block.id, block.name, block.text, 'output')
            elif goes_on and self._draft is not None:
                self._draft.texts[-1] = f'{self._draft.texts[-1]}{block.text}'
                goes_on = False
            else:
                self.say('assistant', block.text)

    def _assistant(self) -> _Draft:
        draft = self._draft
        return draft if draft is not None and draft.role == 'assistant' else self._open('assistant')

    def _open(self, role: str) -> _Draft:
        self._close()
        self._draft = _Draft(role)
        return self._draft

    def _close(self) -> None:
        if self._draft is not None:
            self._messages.append(self._draft.message())
            self._draft = None


def _content(said: list[str | dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Texts as one, of lines; with pictures among them, content parts in their order."""
    if all(isinstance(item, str) for item in said):
        return '\n'.join(item for item in said if isinstance(item, str))
    parts: list[dict[str, Any]] = []
    for item in said:
        if not isinstance(item, str):
            parts.append(item)
        elif parts and parts[-1]['type'] == 'text':
            parts[-1] = {'type': 'text', 'text': f'{parts[-1]["text"]}\n{item}'}
        else:
            parts.append({'type': 'text', 'text': item})
    return parts


def _reopen(message: Message) -> _Draft:
    """A message of the assistant to which more may come; the message itself stays as it is."""
    content, thoughts = message.get('content'), message.get('reasoning_content')
    texts = [] if content is None else list(content) if isinstance(content, list) else [content]
    return _Draft('assistant', texts, [] if thoughts is None else [thoughts],
                  [*message.get('tool_calls', ())])
