"""Trusted and untrusted text in one prompt: control tokens arise from trusted text only.

A prompt is a list of (text, trusted) segments. Their texts are joined before encoding, so that tokens form across the
borders exactly as they would in one string. Only where a control token's text appears in, or reaches into, untrusted
text does the way part: there the text is cut at the control tokens that trusted text spells out by itself (anchors),
and what lies between is encoded by the model alone, which knows no control token.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

from lmdeploy.tokenizer.vocabulary import AddedToken, Place, Vocabulary

Anchor = tuple[int, int, AddedToken]  # start and end in the text, the token that stands there


class SegmentEncoder:
    """Encodes segments over one vocabulary.

    Attributes:
        control: the tokens that untrusted text never becomes, by content (see :attr:`AddedToken.is_control`).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.control = {token.content: token for token in vocabulary.added.values() if token.is_control}
        self.control_ids = frozenset(token.id for token in self.control.values())
        self._control = longest_first(self.control)
        self._cuts = longest_first([*self.control, *vocabulary.control_pieces()])

    def encode(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of the joined segments; no beginning-of-sequence token is added."""
        pieces = [(text, trusted) for text, trusted in segments if text]
        text = ''.join(piece for piece, _ in pieces)
        trusted = _trusted_runs(pieces)
        if trusted == [(0, len(text))] or not text:
            return self.vocabulary.encode(text)
        hits = find_anchors(self._control, self.control, text, 0, len(text))
        if _all_inside(hits, trusted):
            ids = self.vocabulary.encode(text)
            if [i for i in ids if i in self.control_ids] == [hit[2].id for hit in hits]:
                return ids  # nothing in the untrusted text looks like a control token
        anchors = [hit for start, end in trusted for hit in find_anchors(self._control, self.control, text, start, end)]
        return compose(self.vocabulary, text, anchors, self._section)

    def _section(self, text: str, place: Place) -> list[int]:
        """Ids of a text between anchors, none of them a control token."""
        ids = self.vocabulary.encode_section(text, place)
        if self.control_ids.isdisjoint(ids):
            return ids
        # The model itself knows the string as one piece: cut behind the first character of each such string.
        cuts = [match.start() + 1 for match in self._cuts.finditer(text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = self._parts(parts, place)
        if self.control_ids.isdisjoint(ids):
            return ids
        # A single character can be a control token only in a vocabulary made so on purpose; it is left out then.
        return [i for i in self._parts(list(text), place) if i not in self.control_ids]

    def _parts(self, parts: Sequence[str], place: Place) -> list[int]:
        ids: list[int] = []
        for n, part in enumerate(parts):
            ids += self.vocabulary.encode_section(part, Place.INSIDE if n else place)
        return ids


def compose(vocabulary: Vocabulary, text: str, anchors: Sequence[Anchor],
            section: Callable[[str, Place], list[int]] | None = None) -> list[int]:
    """Ids of a text whose added tokens are known: the anchors' ids, and between them the model's.

    Args:
        section: encodes the text between anchors; the vocabulary's ``encode_section`` if None.
    """
    section = section or vocabulary.encode_section
    ids: list[int] = []
    pos, swallow = 0, False
    for start, end, token in anchors:
        between = text[pos:start].lstrip() if swallow else text[pos:start]
        between = between.rstrip() if token.lstrip else between
        if between:
            ids += section(between, Place.AFTER if pos else Place.START)
        ids.append(token.id)
        pos, swallow = end, token.rstrip
    rest = text[pos:].lstrip() if swallow else text[pos:]
    return ids + section(rest, Place.AFTER if pos else Place.START) if rest else ids


def find_anchors(pattern: re.Pattern[str], tokens: Mapping[str, AddedToken], text: str, start: int,
                 end: int) -> list[Anchor]:
    """The tokens spelled out in ``text[start:end]``: the leftmost first, and of those the longest."""
    return [(match.start(), match.end(), tokens[match[0]]) for match in pattern.finditer(text, start, end)]


def longest_first(contents: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, at each place the longest; never, if there is none."""
    ordered = sorted({content for content in contents if content}, key=len, reverse=True)
    return re.compile('|'.join(map(re.escape, ordered)) or r'(?!)')


def _all_inside(hits: Sequence[Anchor], runs: Sequence[tuple[int, int]]) -> bool:
    """Whether every hit lies within one of the runs."""
    starts = [start for start, _ in runs]
    return all((n := bisect_right(starts, start)) and end <= runs[n - 1][1] for start, end, _ in hits)


def _trusted_runs(pieces: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Start and end of each longest stretch of trusted text."""
    runs: list[tuple[int, int]] = []
    pos = 0
    for text, trusted in pieces:
        end = pos + len(text)
        if trusted and runs and runs[-1][1] == pos:
            runs[-1] = (runs[-1][0], end)
        elif trusted:
            runs.append((pos, end))
        pos = end
    return runs
