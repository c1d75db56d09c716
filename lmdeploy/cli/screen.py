"""What the command line says beside the answers: notes and errors, in the reader's language, on stderr.

Answers and lists go to stdout, so that ``lmdeploy chat -q ... > answer.txt`` holds the answer and nothing else.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass

from lmdeploy.config import env
from lmdeploy.errors import LmdeployError
from lmdeploy.texts import LANGUAGES
from lmdeploy.texts.cli import NOTES

__all__ = ['LANGUAGES', 'Screen', 'choose_language']

WIDTH = 100  # columns; a Chinese character takes two


def choose_language(option: str | None = None) -> str:
    """``--lang``, else LMDEPLOY_LANG, else the locale; English where that is neither English nor Chinese."""
    return option or env.language() or env.locale_language()


@dataclass(frozen=True, slots=True)
class Screen:
    """Writes in one language."""

    lang: str

    def text(self, note: str, **params: object) -> str:
        """The text of a note (a key of ``lmdeploy.texts.cli.NOTES``) with its parameters filled in."""
        return NOTES[note][self.lang].format(**params)

    def note(self, note: str, **params: object) -> None:
        """Print a note."""
        print(self.text(note, **params), file=sys.stderr, flush=True)

    def error(self, error: LmdeployError) -> None:
        """Print an error: its code, what happened, and what to do."""
        text = error.text(self.lang)
        if self.lang == 'en':  # Chinese has no spaces to break lines at; the terminal does it
            text = textwrap.fill(text, WIDTH, initial_indent='  ', subsequent_indent='  ', break_long_words=False,
                                 break_on_hyphens=False)
        else:
            text = '  ' + text
        print(f'{self.text("error", code=error.code)}\n{text}', file=sys.stderr, flush=True)
