"""Where questions come from: a terminal with line editing, or lines of a pipe.

A question that begins with three double quotes goes on over several lines until a line ends with three more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from lmdeploy.cli.args import UsageError

QUOTES = '"""'


class Reader(Protocol):
    """A source of questions."""

    def read(self) -> str | None:
        """The next question or command; None: there are no more. KeyboardInterrupt: what was typed is dropped."""
        ...


def is_open(text: str) -> bool:
    """Whether ``text`` begins a block in quotes that it does not end."""
    body = text.lstrip()
    return body.startswith(QUOTES) and not (len(body.rstrip()) >= 2 * len(QUOTES) and body.rstrip().endswith(QUOTES))


def unquoted(text: str) -> str:
    """``text`` without the quotes of a block (also of one that the end of the input cut off)."""
    body = text.strip()
    if not body.startswith(QUOTES):
        return text
    return body[len(QUOTES):].removesuffix(QUOTES).strip('\n')


class PipeReader:
    """One question per line of a binary stream, which must be UTF-8."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.number = 0

    def read(self) -> str | None:
        while True:
            text = self._line()
            if text is None:
                return None
            while is_open(text):
                more = self._line()
                if more is None:
                    break
                text = f'{text}\n{more}'
            text = unquoted(text)
            if text.strip():
                return text

    def _line(self) -> str | None:
        raw = self.stream.readline()
        if not raw:
            return None
        self.number += 1
        return decode(raw, f'standard input (line {self.number})').rstrip('\r\n')


def decode(raw: bytes, what: str) -> str:
    """``raw`` as text; LMD-405 where it is not UTF-8. A byte order mark is dropped."""
    try:
        return raw.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UsageError('LMD-405', what=what, reason=f'byte {error.start}: {error.reason}') from None


class TerminalReader:
    """Line editing with a history file; Enter sends, Alt-Enter starts a new line, a block in quotes sends when closed.

    Args:
        history: the file of earlier questions; made readable by its owner only. Where it cannot be written, the
            history lasts as long as the session.
        prompt: what stands before the cursor.
    """

    def __init__(self, history: Path, prompt: str = '>>> ') -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add('enter')
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if is_open(buffer.text):
                buffer.insert_text('\n')
            else:
                buffer.validate_and_handle()

        @keys.add('escape', 'enter')
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text('\n')

        kept: History = InMemoryHistory()
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
            kept = FileHistory(str(history))
        self.prompt = prompt
        self.session: PromptSession[str] = PromptSession(
            history=kept, key_bindings=keys, multiline=True, prompt_continuation='... ', enable_suspend=True)

    def read(self) -> str | None:
        try:
            return unquoted(self.session.prompt(self.prompt))
        except EOFError:
            return None
