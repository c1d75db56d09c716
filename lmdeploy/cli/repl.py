"""The read-eval-print loop of ``lmdeploy chat``, on a terminal and over pipes alike.

A line that begins with a slash is a command, ``exit`` and ``end`` are LMDeploy's words for two of them, everything else
is a question. An error ends its turn, never the loop.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from lmdeploy.cli.conversation import Talk
from lmdeploy.cli.reader import Reader, TerminalReader
from lmdeploy.cli.screen import Screen, printable
from lmdeploy.cli.settings import Settings
from lmdeploy.config import env
from lmdeploy.errors import EngineDead, LmdeployError, RequestError
from lmdeploy.frontend.frontend import RequestOutput

WORDS = {'exit': '/exit', 'end': '/reset'}
TOO_LONG = ('LMD-301', 'LMD-307')


class Leave(Exception):
    """The user wants to leave."""


@dataclass(slots=True)
class Answer:
    """What became of one question: its last piece, whether it was stopped, and times in seconds from the question."""

    last: RequestOutput | None = None
    stopped: bool = False
    first: float = 0.0
    total: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second after the first token."""
        tokens = self.last.generated_len - 1 if self.last else 0
        return tokens / (self.total - self.first) if tokens > 0 and self.total > self.first else 0.0


def converse(conversation: Talk, settings: Settings, screen: Screen, question: str | None, reader: Reader | None,
             ready: Callable[[], None]) -> int:
    """Answer ``question`` alone, or it and those of ``reader``, or (neither given) those of a person at the terminal.

    Args:
        ready: tells the person that typing may begin.

    Returns:
        The exit code; the conversation is closed.
    """
    person = reader is None and question is None
    repl = Repl(conversation, settings, screen, terminal=sys.stdout.isatty(), interactive=person)
    try:
        if question is not None and reader is None:
            repl.ask(question)
            return 0
        if person:
            ready()
            reader = TerminalReader(env.cache_dir() / 'chat_history')
        assert reader is not None
        return repl.run(reader, question)
    finally:
        conversation.close()


class Repl:
    """Questions from a reader, answers to stdout, everything else to the screen.

    Args:
        conversation: the model and what was said.
        settings: how answers are generated; ``/set`` replaces them.
        screen: where notes and errors go.
        terminal: stdout is a terminal: control characters in an answer are not passed on to it.
        interactive: a person types: an interrupt stops the answer rather than the loop.
    """

    def __init__(self, conversation: Talk, settings: Settings, screen: Screen, *, terminal: bool,
                 interactive: bool) -> None:
        self.conversation, self.settings, self.screen = conversation, settings, screen
        self.terminal, self.interactive = terminal, interactive
        self.commands: dict[str, Callable[[str], None]] = {
            '/help': self._help, '/reset': self._reset, '/system': self._system, '/set': self._set, '/exit': self._exit,
        }

    def run(self, reader: Reader, first: str | None = None) -> int:
        """Serve questions, ``first`` before those of ``reader``, until there are no more; the exit code.

        For a person it is 0; over a pipe it is 1 if any question failed.
        """
        failed = False
        try:
            while True:
                try:
                    line, first = (reader.read() if first is None else first), None
                except KeyboardInterrupt:
                    if not self.interactive:
                        raise
                    self.screen.note('leave')
                    continue
                if line is None:
                    break
                try:
                    self.take(line)
                except EngineDead:
                    raise
                except LmdeployError as error:
                    failed = True
                    self.screen.error(error)
        except Leave:
            pass
        return 1 if failed and not self.interactive else 0

    def take(self, line: str) -> None:
        """One line: a command or a question.

        Raises:
            Leave: the user wants to leave.
            LmdeployError: the command is not usable, or the question failed.
            KeyboardInterrupt: see :meth:`ask`.
        """
        word = WORDS.get(line.strip(), line)
        if not word.strip():
            return
        if word.startswith('/'):
            name, _, rest = word.strip().partition(' ')
            command = self.commands.get(name)
            if command is None:
                raise RequestError('LMD-407', name=name)
            command(rest.strip())
        else:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Ask, print the answer as it comes, and say how it ended.

        Raises:
            LmdeployError: the question failed.
            KeyboardInterrupt: it was interrupted, and nobody is there to ask another.
        """
        answer = self._answer(question)
        self._epilogue(answer)
        if answer.stopped and not self.interactive:
            raise KeyboardInterrupt
        if answer.last is not None and answer.last.error is not None:
            raise answer.last.error

    def _answer(self, question: str) -> Answer:
        self.conversation.gen = self.settings.gen
        answer, start, begun = Answer(), time.perf_counter(), False
        pieces = self.conversation.ask(question)
        try:
            for piece in pieces:
                if piece.generated_len and not answer.first:
                    answer.first = time.perf_counter() - start
                answer.last = piece
                text = piece.text if begun else piece.text.lstrip()
                if text:
                    begun = True
                    sys.stdout.write(printable(text) if self.terminal else text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            answer.stopped = True
        finally:
            pieces.close()  # type: ignore[attr-defined]
        answer.total = time.perf_counter() - start
        if begun:
            print(flush=True)
        return answer

    def _epilogue(self, answer: Answer) -> None:
        last = answer.last
        if answer.stopped:
            self.screen.note('stopped')
        elif last is not None and last.finish_reason == 'length':
            self.screen.note('length', tokens=last.generated_len)
        if last is not None and last.error is not None and last.error.code in TOO_LONG and self.conversation.turns:
            self.screen.note('too_long')
        if self.settings.verbose and last is not None and last.generated_len:
            self.screen.note('statistics', prompt=last.input_len, first=answer.first, tokens=last.generated_len,
                             rate=answer.rate)

    def _help(self, _: str) -> None:
        self.screen.note('help')

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.screen.note('reset')

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == 'off' else text
        if self.conversation.system is None:
            self.screen.note('system_none')
        else:
            print(self.conversation.system, file=sys.stderr)

    def _set(self, text: str) -> None:
        if text:
            self.settings = self.settings.change(text.split(), self.conversation.vocab_size)
        changed = {assignment.partition('=')[0] for assignment in text.split()}
        for line in self.settings.lines():
            if not changed or line.partition('=')[0] in changed:
                print(line, file=sys.stderr)

    def _exit(self, _: str) -> None:
        raise Leave
