"""Vocabularies of the ``tokenizers`` library: tokenizer.json files and byte-level GGUF vocabularies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lmdeploy.errors import LoadError
from lmdeploy.log import get_logger
from lmdeploy.tokenizer.settings import Settings
from lmdeploy.tokenizer.spelling import byte_speller
from lmdeploy.tokenizer.vocabulary import AddedToken, Place

PROBE = 'Hello, 12 \u4f60\u597d\n\U0001f642'  # encoded once while loading, so that a broken file fails there


class FastVocabulary:
    """A :class:`tokenizers.Tokenizer` behind the face of :class:`lmdeploy.tokenizer.vocabulary.Vocabulary`.

    Args:
        full: the complete tokenizer, all added tokens in place.
        origin: the file that errors name.

    Attributes:
        affixes: the ids that the file's own post-processor puts before and after a text.

    Raises:
        LoadError: LMD-161 (a decoder that cannot be streamed), LMD-151 (the library fails on a plain text).
    """

    def __init__(self, full: tokenizers.Tokenizer, origin: str) -> None:
        self.spelling, self._spell = byte_speller(_state(full.decoder), origin)
        with reading(origin):
            full.no_truncation()
            full.no_padding()
            self.full = full
            self.added = {token.content: token for token in _added_tokens(full)}
            self.size = _size(full)
            self._sections: dict[Place, tuple[tokenizers.Tokenizer, dict[int, int]]] = {}
            self._after = _place_after(full)
            self.affixes = self._affixes()
            for place in Place:
                self.encode_section(PROBE, place)

    def encode(self, text: str) -> list[int]:
        return self.full.encode(text, add_special_tokens=False).ids

    def encode_section(self, text: str, place: Place) -> list[int]:
        if place is Place.AFTER:
            place = self._after
        if place not in self._sections:
            self._sections[place] = self._without_control(place)
        plain, renumber = self._sections[place]
        ids = plain.encode(text, add_special_tokens=False).ids
        return [renumber.get(i, i) for i in ids] if renumber else ids

    def piece(self, token: int) -> str | None:
        return self.full.id_to_token(token) if 0 <= token < 1 << 32 else None

    def token_bytes(self, token: int, first: bool = False) -> bytes:
        piece = self.piece(token)
        return b'' if piece is None else self._spell(piece, first)

    def find(self, piece: str) -> int | None:
        return self.full.token_to_id(piece)

    def control_pieces(self) -> Iterable[str]:
        return ()

    def _affixes(self) -> tuple[list[int], list[int]]:
        plain = self.full.encode('a', add_special_tokens=False).ids
        dressed = self.full.encode('a', add_special_tokens=True).ids
        for start in range(len(dressed) - len(plain) + 1):
            if dressed[start:start + len(plain)] == plain:
                return dressed[:start], dressed[start + len(plain):]
        return [], []

    def _without_control(self, place: Place) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The same model (shared, not copied) with its harmless added tokens only, and their ids' way back."""
        plain = tokenizers.Tokenizer(self.full.model)
        inside = place is Place.INSIDE
        if self.full.normalizer is not None:
            plain.normalizer = _unprefixed(self.full, 'normalizer') if inside else self.full.normalizer
        if self.full.pre_tokenizer is not None:
            plain.pre_tokenizer = _unprefixed(self.full, 'pre_tokenizer') if inside else self.full.pre_tokenizer
        harmless = [token for token in self.added.values() if not token.is_control]
        plain.add_tokens([
            tokenizers.AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized)
            for token in harmless])
        renumber = {plain.token_to_id(token.content): token.id for token in harmless}
        return plain, {old: new for old, new in renumber.items() if old is not None and old != new}


def load_fast(path: Path, settings: Settings) -> FastVocabulary:
    """Read a tokenizer.json and add what the files beside it declare.

    Raises:
        LoadError: LMD-151 (damaged), LMD-161 (a decoder that cannot be streamed).
    """
    with reading(str(path)):
        text = path.read_text(encoding='utf-8')
        _check_prefix(text)
        full = tokenizers.Tokenizer.from_str(text)
        if settings.tokenizer_class == 'LlamaTokenizer':
            _as_llama(full, settings)
        _add_missing(full, settings)
    return FastVocabulary(full, str(path))


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Turn what the library raises over a damaged file into LMD-151: bare Exceptions, and for some files a panic of its
    Rust code, a BaseException that has no importable name."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == 'PanicException':
            raise LoadError('LMD-151', file=origin, reason=str(error)) from error
        raise


def _check_prefix(text: str) -> None:
    """Refuse merges that lack the prefix they must have: the library would cut them inside a character and abort."""
    if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text) is None:
        return
    model = json.loads(text)['model']
    prefix = model.get('continuing_subword_prefix')
    for merge in model.get('merges', ()) if prefix else ():
        if not (merge.split(' ') if isinstance(merge, str) else merge)[-1].startswith(prefix):
            raise ValueError(f'merge {merge!r} does not have the prefix {prefix!r}')


def _as_llama(full: tokenizers.Tokenizer, settings: Settings) -> None:
    """Give a Llama-class SentencePiece vocabulary the spaces of that class, whatever the file says.

    Converted files differ in where they put the prefix space; the class (transformers 5) puts one at the start of the
    text, and, only if ``legacy`` is set, after every added token as well.
    """
    if not isinstance(full.model, models.BPE) or 'ByteLevel' in json.dumps(_state(full.pre_tokenizer)):
        return
    prefix = settings.add_prefix_space is not False
    scheme = 'never' if not prefix else 'always' if settings.legacy else 'first'
    full.normalizer = None
    full.pre_tokenizer = pre_tokenizers.Metaspace(replacement='\u2581', prepend_scheme=scheme, split=False)
    steps = [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
    full.decoder = decoders.Sequence([*steps, decoders.Strip(content=' ', left=1)] if prefix else steps)


def _add_missing(full: tokenizers.Tokenizer, settings: Settings) -> None:
    """Add the tokens that tokenizer_config.json declares and tokenizer.json lacks, in the order of their ids."""
    present = {token.content for token in full.get_added_tokens_decoder().values()}
    special = set(settings.named.values()) | set(settings.extra_special)
    missing = {token.content: token for token in settings.added if token.content not in present}
    added = [
        tokenizers.AddedToken(token.content, special=token.special or token.content in special, lstrip=token.lstrip,
                              rstrip=token.rstrip, normalized=token.normalized)
        for token in missing.values()]
    added += [tokenizers.AddedToken(content, special=True, normalized=False)
              for content in dict.fromkeys([*settings.named.values(), *settings.extra_special])
              if content not in present and content not in missing]
    full.add_tokens(added)
    for token in missing.values():
        found = full.token_to_id(token.content)
        if found != token.id:
            get_logger().warning('%s declares id %d for token %r, but it is the %s-th of the vocabulary',
                                 settings.origin, token.id, token.content, found)


def _added_tokens(full: tokenizers.Tokenizer) -> list[AddedToken]:
    return [AddedToken(token.content, id, token.special, token.lstrip, token.rstrip, token.normalized)
            for id, token in full.get_added_tokens_decoder().items()]


def _size(full: tokenizers.Tokenizer) -> int:
    count = full.get_vocab_size(with_added_tokens=True)
    if count and full.id_to_token(count - 1) is not None:
        return count  # ids without holes, as nearly all are
    return max(full.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _state(part: Any) -> dict:
    """The JSON description of a normalizer, pre-tokenizer or decoder ({} for None)."""
    return {} if part is None else json.loads(part.__getstate__())


def _place_after(full: tokenizers.Tokenizer) -> Place:
    """How a section after an added token begins: a Metaspace of scheme 'first' prefixes the text's start only."""
    first = '"prepend_scheme": "first"' in json.dumps(_state(full.pre_tokenizer))
    return Place.INSIDE if first else Place.START


def _unprefixed(full: tokenizers.Tokenizer, part: str) -> Any:
    """The tokenizer's normalizer or pre-tokenizer without the space that it would put before a text."""
    donor: dict[str, Any] = {
        'version': '1.0', 'model': {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}, 'added_tokens': [],
        'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': None}
    donor[part] = _drop_prefix(_state(getattr(full, part)))
    return getattr(tokenizers.Tokenizer.from_str(json.dumps(donor)), part)


def _drop_prefix(state: dict) -> dict:
    for inner in ('normalizers', 'pretokenizers'):
        if inner in state:
            return state | {inner: [_drop_prefix(s) for s in state[inner]]}
    if state.get('type') == 'Prepend':
        return {'type': 'Sequence', 'normalizers': []}
    if state.get('type') == 'Metaspace':
        return {key: value for key, value in state.items() if key != 'add_prefix_space'} | {'prepend_scheme': 'never'}
    return state | {'add_prefix_space': False} if 'add_prefix_space' in state else state
