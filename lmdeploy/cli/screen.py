"""What the command line says beside the answers: notes and errors, in the reader's language, on stderr.

Answers and lists go to stdout, so that ``lmdeploy chat -q ... > answer.txt`` holds the answer and nothing else.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from dataclasses import dataclass

from lmdeploy.config import env
from lmdeploy.errors import LmdeployError
from lmdeploy.log import json_line
from lmdeploy.texts import LANGUAGES
from lmdeploy.texts.cli import NOTES
from lmdeploy.texts.lite import NOTES as LITE_NOTES

__all__ = ['LANGUAGES', 'Screen', 'choose_language', 'printable']

MAX_COLUMNS = 100


def choose_language(option: str | None = None) -> str:
    """``--lang``, else LMDEPLOY_LANG, else the locale; English where that is neither English nor Chinese."""
    return option or env.language() or env.locale_language()


@dataclass(frozen=True, slots=True)
class Screen:
    """Writes in one language.

    Attributes:
        as_json: every note is a line of a log for machines.
    """

    lang: str
    as_json: bool = False

    def text(self, note: str, **params: object) -> str:
        """The text of a note (a key of NOTES in ``lmdeploy.texts``) with its parameters filled in."""
        return (NOTES.get(note) or LITE_NOTES[note])[self.lang].format(**params)

    def note(self, note: str, **params: object) -> None:
        """Print a note."""
        self._print(self.text(note, **params))

    def error(self, error: LmdeployError) -> None:
        """Print an error: its code, what happened, and what to do."""
        if self.as_json:
            self.line(f'{error.code}: {error.text(self.lang)}', 'ERROR')
            return
        self._print(self.text('error', code=error.code))
        self._print(error.text(self.lang), indent='  ')

    def line(self, text: str, level: str = 'INFO') -> None:
        """Print one line, whatever the terminal's width: it is to be copied, or read by programs."""
        text = printable(text)
        print(json_line(time.time(), level, 'server', text) if self.as_json else text, file=sys.stderr, flush=True)

    def _print(self, text: str, indent: str = '') -> None:
        if self.as_json:
            self.line(text)
            return
        for line in printable(text).split('\n'):
            if self.lang == 'en' and len(indent + line) > _columns():  # a terminal breaks Chinese well by itself
                line = textwrap.fill(line, _columns(), subsequent_indent=indent, break_long_words=False,
                                     break_on_hyphens=False, initial_indent=indent)
            else:
                line = indent + line
            print(line, file=sys.stderr, flush=True)


def _columns() -> int:
    """Columns for text: those of the terminal, but no more than reads well."""
    return min(MAX_COLUMNS, shutil.get_terminal_size().columns if sys.stderr.isatty() else MAX_COLUMNS)


def printable(text: str) -> str:
    """``text`` without control characters other than line ends and tabs: no model and no file steers the terminal."""
    return ''.join(c for c in text if c in '\n\t' or not (c < ' ' or '\x7f' <= c < '\xa0'))
