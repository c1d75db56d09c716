"""Keeps control tokens that somebody typed apart from those of the template.

Life cycle of one rendering: every control string inside untrusted text is exchanged for a *stand-in*, one private-use
character; the template renders; the result is split at the stand-ins, which become untrusted segments again. Since all
private-use characters of that plane in the input are exchanged as well, nobody can type a stand-in; and since a
stand-in is one character, no trimming, slicing or wrapping can tear it.

A template may also build a control string out of harmless pieces (``'<|im_' ~ 'end|>'``, lower-casing, removing what
stands between). Therefore, if the input contains any character that control strings are made of, it is rendered a
second time with *each such character* exchanged. The control strings found in that second text are the template's own
for certain; if the first text has others, the second one is used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from lmdeploy.chat.messages import Segment
from lmdeploy.errors import RequestError

FIRST, LAST = 0x100000, 0x10FFFD  # supplementary private use area B
PRIVATE = re.compile(f'[{chr(FIRST)}-{chr(LAST)}]')
STAND_INS = re.compile(f'({PRIVATE.pattern}+)')
REASONING = re.compile(r'</?think(ing)?>')


def _any_of(strings: Iterable[str]) -> str:
    """A pattern for any of the strings, the longest first; of nothing, one that never matches."""
    return '|'.join(re.escape(s) for s in sorted(strings, key=lambda s: (-len(s), s))) or '(?!)'


class ControlStrings:
    """The control strings of one tokenizer, ready to be looked for.

    Args:
        control: the texts of all tokens that untrusted text must not become.
        special: those that steer the conversation itself (begin and end of turns). The others (``<tool_call>``,
            ``<think>``) are what a model writes in an answer, and templates take old answers apart at them, so they
            are left alone in assistant messages.
    """

    def __init__(self, control: Iterable[str], special: Iterable[str]) -> None:
        control = {s for s in control if s and not s.isspace()}
        turns = {s for s in control & set(special) if not REASONING.fullmatch(s)}
        self.everywhere = re.compile(_any_of(control))
        self.turns = re.compile(_any_of(turns))
        # '&' because of HTML entities, which a template's filter might resolve
        marks = {c for s in control for c in s if not (c.isalnum() or c.isspace() or c == '_')} | {'&'}
        marks |= {s[0] for s in control if not marks & set(s)}
        self.marks = re.compile(f'[{re.escape("".join(sorted(marks)))}]')


class Cover:
    """The stand-ins of one rendering. Every text is covered exactly once: a private-use character in it is the user's.

    Args:
        strings: what to look for.
        each_mark: exchange every single character of control strings, not only whole ones.
    """

    def __init__(self, strings: ControlStrings, each_mark: bool = False) -> None:
        self.strings = strings
        self.each_mark = each_mark
        self.has_marks = False
        self._originals: dict[str, str] = {}
        self._stand_ins: dict[str, str] = {}
        self._next = random.SystemRandom().randrange(LAST - FIRST + 1)

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with all their texts covered, the roles excepted."""
        return [{key: value if key == 'role' else self.value(value, answer=message['role'] == 'assistant')
                 for key, value in message.items()} for message in messages]

    def value(self, value: Any, answer: bool = False) -> Any:
        """A plain JSON value with all its texts covered, keys included."""
        if isinstance(value, str):
            return self.text(value, answer)
        if isinstance(value, list):
            return [self.value(v, answer) for v in value]
        if isinstance(value, dict):
            return {self.value(k, answer): self.value(v, answer) for k, v in value.items()}
        return value

    def text(self, text: str, answer: bool = False) -> str:
        """The text with its control strings (and private-use characters) exchanged for stand-ins."""
        if not text.isascii():
            text = PRIVATE.sub(self._exchange, text)
        covered = (self.strings.turns if answer else self.strings.everywhere).sub(self._exchange, text)
        if self.each_mark:
            return self.strings.marks.sub(self._exchange, covered)
        self.has_marks = self.has_marks or self.strings.marks.search(covered) is not None
        return covered

    def _exchange(self, match: re.Match[str]) -> str:
        original = match[0]
        stand_in = self._stand_ins.get(original)
        if stand_in is None:
            most = LAST - FIRST + 1
            if len(self._stand_ins) == most:
                raise RequestError('LMD-180', most=most)
            stand_in = chr(FIRST + self._next)
            self._next = (self._next + 1) % most
            self._stand_ins[original] = stand_in
            self._originals[stand_in] = original
        return stand_in

    def open(self, rendered: str) -> list[Segment]:
        """The rendered text as segments, every stand-in turned back into the untrusted text that it stands for."""
        segments: list[Segment] = []
        for i, run in enumerate(STAND_INS.split(rendered)):
            if i % 2 == 0:
                _append(segments, run, True)
                continue
            for char in run:
                original = self._originals.get(char)
                _append(segments, char if original is None else original, original is None)
        return segments


def _append(segments: list[Segment], text: str, trusted: bool) -> None:
    if not text:
        return
    if segments and segments[-1].trusted == trusted:
        segments[-1] = Segment(segments[-1].text + text, trusted)
    else:
        segments.append(Segment(text, trusted))


def render_apart(strings: ControlStrings, render: Callable[[Cover], str]) -> list[Segment]:
    """Render with covered input, and make sure that no control string of the result comes from the input.

    Args:
        strings: the tokenizer's control strings.
        render: renders input that it passes through the given cover first.
    """
    cover = Cover(strings)
    text = render(cover)
    if cover.has_marks:
        strict = Cover(strings, each_mark=True)
        text_of_template = render(strict)
        if strings.turns.findall(text) != strings.turns.findall(text_of_template):
            return strict.open(text_of_template)
    return cover.open(text)
