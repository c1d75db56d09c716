"""Where pictures stand in a prompt: from messages with pictures to texts with marks, and from marks to tokens.

A message says where its pictures are in one of three ways:

====================  ==================================================================================
IMAGE_TOKEN           stands in its text, once for each picture
texts and pictures    in turn: pictures stand where they are
one text              before or after all pictures: the pictures come first, as models are trained
====================  ==================================================================================

While the chat template renders the messages, a mark stands for each picture: one private-use character that the
conversation does not have, so that nobody can type it. What a model wants around pictures is put in afterwards, as
trusted text: control tokens in it act.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmdeploy.config.vision import INTERNVL, QWEN2_5_VL, QWEN2_VL, Layout, VisionModelConfig
from lmdeploy.errors import RequestError
from lmdeploy.vl.constants import IMAGE_TOKEN
from lmdeploy.vl.processor import ImageOptions, Processor

FIRST, LAST = 0xF0000, 0xFFFF0  # private use, plane 15
SOURCES = ('image_url', 'image', 'image_data', 'input_image')
OPTIONS = ('max_dynamic_patch', 'detail', 'min_pixels', 'max_pixels')


class Piece(NamedTuple):
    """Text of a prompt; in trusted text control tokens act."""

    text: str
    trusted: bool


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    control_tokens: dict[str, int]

    def encode_segments(self, segments: Iterable[tuple[str, bool]], add_bos: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a message, not loaded yet: what ``load_image`` takes, and what the message asks for."""

    source: Any
    options: ImageOptions = ImageOptions()


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A picture in a prompt: tokens ``start .. end - 1``; the rest as :class:`lmdeploy.engine.request.ImageSpan`."""

    start: int
    end: int
    digest: bytes
    layout: Layout
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Style:
    """How a model's prompts write pictures.

    Attributes:
        merged: neighbours have one opening and one closing text together.
        behind: what follows each picture (or each run of merged ones) that the text does not place itself.
    """

    merged: bool
    behind: str


def style(config: VisionModelConfig) -> Style:
    """That of a model."""
    if config.architecture in (QWEN2_VL, QWEN2_5_VL):
        return Style(False, '')
    return Style(config.architecture == INTERNVL, '\n')


def has_pictures(messages: Any) -> bool:
    """Whether a content part of a conversation is something else than text."""
    return isinstance(messages, list) and any(
        isinstance(part, dict) and part.get('type', 'text') != 'text'
        for message in messages if isinstance(message, dict) and isinstance(message.get('content'), (list, tuple))
        for part in message['content'])


def with_pictures(text: str, images: Sequence[Any]) -> dict[str, Any]:
    """A user's message of a text and pictures."""
    return {'role': 'user', 'content': [{'type': 'text', 'text': text},
                                        *({'type': 'image', 'image': image} for image in images)]}


class Marked(NamedTuple):
    """A conversation without pictures, the pictures in their order, and the mark in the place of each."""

    messages: list[Any]
    pictures: list[Picture]
    mark: str


def mark_pictures(messages: Sequence[Any], config: VisionModelConfig) -> Marked:
    """Take the pictures out of a conversation. What else may be wrong with it is left to who renders it.

    Raises:
        RequestError: LMD-672 (number of IMAGE_TOKENs), LMD-674, LMD-675 (a content part).
    """
    mark, how = _free_mark(messages), style(config)
    pictures: list[Picture] = []
    marked: list[Any] = []
    for index, message in enumerate(messages):
        content = message.get('content') if isinstance(message, dict) else None
        if isinstance(content, (list, tuple)) and has_pictures([message]):
            items = list(_items(index, content))
            found = [item for item in items if isinstance(item, Picture)]
            pictures += found
            message = {**message, 'content': _text(index, items, len(found), mark, how)}
        marked.append(message)
    return Marked(marked, pictures, mark)


def _free_mark(messages: Any) -> str:
    """A private-use character that no text of the messages has."""
    used: set[str] = set()
    parts: list[Any] = [messages]
    while parts:
        part = parts.pop()
        if isinstance(part, str) and not part.isascii():
            used.update(char for char in part if FIRST <= ord(char) <= LAST)
        elif isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, (list, tuple)):
            parts += part
    start = random.SystemRandom().randrange(LAST - FIRST)
    every = (chr(FIRST + (start + i) % (LAST - FIRST)) for i in range(LAST - FIRST))
    return next((char for char in every if char not in used), chr(LAST))


def _items(index: int, content: Sequence[Any]) -> Iterator[str | Picture]:
    """Texts and pictures of one message."""
    for part in content:
        if not isinstance(part, dict):
            raise RequestError('LMD-675', index=index, kind=type(part).__name__, reason='it must be an object')
        kind = part.get('type', 'text')
        if kind == 'text':
            if not isinstance(part.get('text'), str):
                raise RequestError('LMD-675', index=index, kind='text', reason='its text is missing')
            yield part['text']
        elif kind in SOURCES:
            yield _picture(index, kind, part)
        else:
            raise RequestError('LMD-674', index=index, kind=str(kind)[:100])


def _picture(index: int, kind: str, part: dict[str, Any]) -> Picture:
    inner = part.get('image_url' if kind == 'input_image' else kind, part.get('data'))
    asked = {name: part[name] for name in OPTIONS if part.get(name) is not None}
    if isinstance(inner, dict):
        asked |= {name: inner[name] for name in OPTIONS if inner.get(name) is not None}
        inner = inner.get('url', inner.get('data'))
    if inner is None:
        raise RequestError('LMD-675', index=index, kind=kind, reason='its picture is missing')
    for name, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, str if name == 'detail' else int):
            raise RequestError('LMD-675', index=index, kind=kind, reason=f'{name} is of the wrong type')
    return Picture(inner, ImageOptions(**asked))


def _text(index: int, items: list[str | Picture], count: int, mark: str, how: Style) -> str:
    """The text of one message with a mark for each of its ``count`` pictures."""
    texts = [item for item in items if isinstance(item, str)]
    given = '\n'.join(texts)
    tokens = given.count(IMAGE_TOKEN)
    if tokens:
        if tokens != count:
            raise RequestError('LMD-672', index=index, tokens=tokens, images=count)
        return given.replace(IMAGE_TOKEN, mark)
    if len(texts) <= 1 and _one_run(items):
        return _run(count, mark, how) + given
    parts, run, said = [], 0, False
    for item in [*items, '']:
        if isinstance(item, Picture):
            run, said = run + 1, False
            continue
        if run:
            parts.append(_run(run, mark, how))
        parts.append('\n' + item if said and item else item)
        run, said = 0, True
    return ''.join(parts)


def _one_run(items: Sequence[str | Picture]) -> bool:
    """Whether all pictures stand side by side, at one end of the message."""
    kinds = [isinstance(item, Picture) for item in items]
    return all(kinds[:-1]) or all(kinds[1:])


def _run(count: int, mark: str, how: Style) -> str:
    return mark * count + how.behind if how.merged else (mark + how.behind) * count


def digest(pixels: np.ndarray, layout: Layout) -> bytes:
    """What a prepared picture is known by: of its pixels and of how they were made."""
    found = hashlib.blake2b(repr((pixels.shape, layout)).encode(), digest_size=16)
    found.update(np.ascontiguousarray(pixels).data)
    return found.digest()


class Assembler:
    """Puts pictures into the prompts of one model.

    Args:
        config: of the model's pictures.
        processor: prepares them.
        tokenizer: the model's.
        load: makes a picture of Pillow's of a picture's source.
        vocab_size: embeddings of the model; a picture's token need not have one.
    """

    def __init__(self, config: VisionModelConfig, processor: Processor, tokenizer: Encoder,
                 load: Callable[[Any], Any], vocab_size: int) -> None:
        self.config, self.processor, self.tokenizer, self.load = config, processor, tokenizer, load
        self.token = tokenizer.control_tokens.get(config.image_token)
        wanted = config.image_token_id if self.token is None else self.token
        self.placeholder = wanted if wanted is not None and wanted < vocab_size else 0

    def assemble(self, segments: Sequence[tuple[str, bool]], mark: str, pictures: Sequence[Picture], *,
                 add_bos: bool) -> tuple[list[int], tuple[Placed, ...]]:
        """Tokens of rendered segments, and the pictures in them.

        Raises:
            RequestError: LMD-673: there are not as many marks as pictures; what is wrong with a picture.
        """
        groups = _split(segments, mark)
        if len(groups) != len(pictures) + 1:
            raise RequestError('LMD-673', found=len(groups) - 1, images=len(pictures))
        self._wrap(groups)
        prepared = [self.processor.process(self.load(picture.source), picture.options) for picture in pictures]
        tokens: list[int] = []
        placed: list[Placed] = []
        for i, ids in enumerate(self._encode(groups, add_bos)):
            tokens += ids
            if i < len(prepared):
                start, one = len(tokens), prepared[i]
                tokens += [self.placeholder] * one.layout.tokens
                placed.append(Placed(start, len(tokens), digest(one.pixels, one.layout), one.layout, one.pixels))
        return tokens, tuple(placed)

    def _wrap(self, groups: list[list[Piece]]) -> None:
        """Put what the model wants around pictures to the ends of the texts between them."""
        before, after, merged = self.config.before, self.config.after, style(self.config).merged
        last = len(groups) - 1
        for i, group in enumerate(groups):
            between = 0 < i < last and not any(piece.text for piece in group)
            if merged and between:
                continue
            if i > 0:
                group.insert(0, Piece(after, True))
            if i < last:
                group.append(Piece(before, True))

    def _encode(self, groups: list[list[Piece]], add_bos: bool) -> list[list[int]]:
        """Ids of the texts before, between and after pictures. Where the tokenizer knows a picture's token, all is
        encoded as one text, so that tokens form around it as in training."""
        if self.token is None:
            return [self.tokenizer.encode_segments(group, add_bos=add_bos and not i) for i, group in enumerate(groups)]
        joined = list(groups[0])
        for group in groups[1:]:
            joined += [Piece(self.config.image_token, True), *group]
        found: list[list[int]] = [[]]
        for token in self.tokenizer.encode_segments(joined, add_bos=add_bos):
            if token == self.token:
                found.append([])
            else:
                found[-1].append(token)
        if len(found) != len(groups):  # somebody's own text, which no template has made, spells the token
            raise RequestError('LMD-673', found=len(found) - 1, images=len(groups) - 1)
        return found


def _split(segments: Sequence[tuple[str, bool]], mark: str) -> list[list[Piece]]:
    """The pieces before, between and after marks."""
    groups: list[list[Piece]] = [[]]
    for text, trusted in segments:
        first, *rest = text.split(mark)
        if first:
            groups[-1].append(Piece(first, trusted))
        for part in rest:
            groups.append([Piece(part, trusted)] if part else [])
    return groups
