"""A conversation that comes in items, put together as messages.

What the assistant thought, said and called in a row is one message, and every result names the call that it answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmdeploy.serve.blocks import Block
from lmdeploy.serve.errors import HttpError

Message = dict[str, Any]


class Turns:
    """Collects messages in the form of OpenAI's chat completions.

    Args:
        before: what was said earlier.
        join_users: neighbouring texts of one role other than the assistant are one message too.
    """

    def __init__(self, before: Iterable[Message] = (), *, join_users: bool = False) -> None:
        self.messages: list[Message] = []
        self._join_users = join_users
        self._functions: dict[str, str] = {}  # of the calls so far, by their ids
        for message in before:
            self.messages.append(message)
            for call in message.get('tool_calls', ()):
                self._functions[call['id']] = call['function']['name']

    def say(self, role: str, text: str, *, between: str = '\n') -> None:
        """Somebody says something; ``between`` stands between texts of one message."""
        last = self.messages[-1] if self.messages else None
        if role == 'assistant':
            message = self._assistant()
            message['content'] = text if message['content'] is None else f'{message["content"]}{between}{text}'
        elif self._join_users and last is not None and last['role'] == role:
            self.messages[-1] = {**last, 'content': f'{last["content"]}{between}{text}'}
        else:
            self.messages.append({'role': role, 'content': text})

    def think(self, text: str) -> None:
        """The assistant thinks."""
        message = self._assistant()
        before = message.get('reasoning_content')
        message['reasoning_content'] = text if before is None else f'{before}\n{text}'

    def call(self, call_id: str, name: str, arguments: str, param: str) -> None:
        """The assistant calls a function; ``arguments`` are JSON text.

        Raises:
            HttpError: LMD-512, another call has that id.
        """
        if call_id in self._functions:
            raise HttpError('LMD-512', param=param, reason=f'two calls have the id {call_id[:100]!r}')
        self._functions[call_id] = name
        self._assistant().setdefault('tool_calls', []).append(
            {'id': call_id, 'type': 'function', 'function': {'name': name, 'arguments': arguments}})

    def result(self, call_id: str, text: str, param: str) -> None:
        """What a call gave.

        Raises:
            HttpError: LMD-512, there was no such call.
        """
        name = self._functions.get(call_id)
        if name is None:
            raise HttpError('LMD-512', param=param, reason=f'no call before it has the id {call_id[:100]!r}')
        self.messages.append({'role': 'tool', 'tool_call_id': call_id, 'name': name, 'content': text})

    def answer(self, blocks: Iterable[Block]) -> None:
        """What the model has answered. A message of its own that it was to continue goes on with the first text."""
        between = '' if self.messages and self.messages[-1]['role'] == 'assistant' else '\n'
        for block in blocks:
            if block.kind == 'reasoning':
                self.think(block.text)
            elif block.kind == 'text':
                self.say('assistant', block.text, between=between)
                between = '\n'
            else:
                self.call(block.id, block.name, block.text, 'output')

    def _assistant(self) -> Message:
        """The assistant's message that is being put together. One that is only read by others is copied first."""
        if self.messages and self.messages[-1]['role'] == 'assistant':
            message = dict(self.messages[-1])
            if 'tool_calls' in message:
                message['tool_calls'] = [*message['tool_calls']]
            self.messages[-1] = message
        else:
            message = {'role': 'assistant', 'content': None}
            self.messages.append(message)
        return message
