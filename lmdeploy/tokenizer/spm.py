"""SentencePiece vocabularies: tokenizer.model files, and the same model built from a GGUF file's lists.

The ``sentencepiece`` library is loaded on first use. Two processors of one model are kept: as the file says, and with
the prefix space off (a protobuf message that ends with the field again overrides it), for text inside a text.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmdeploy.errors import LoadError
from lmdeploy.tokenizer.segments import compose, find_anchors, longest_first
from lmdeploy.tokenizer.settings import Settings
from lmdeploy.tokenizer.spelling import byte_fallback_speller
from lmdeploy.tokenizer.vocabulary import AddedToken, Place, Spelling

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_NO_PREFIX = b'\x1a\x02\x18\x00'  # normalizer_spec { add_dummy_prefix: false }


class SpmVocabulary:
    """A SentencePiece model plus added tokens, behind the face of a vocabulary.

    Args:
        model: the serialised model.
        added: the added tokens; the model's control and unknown pieces join them.
        prefix_after_added: text after an added token gets the model's prefix space too, as at the start.

    Raises:
        LoadError: LMD-151 (no SentencePiece model), LMD-154 (the library is missing).
    """

    def __init__(self, model: bytes, origin: str, added: Iterable[AddedToken], prefix_after_added: bool) -> None:
        self.model = _processor(model, origin)
        self._inside = _processor(model + _NO_PREFIX, origin)
        pieces = self.model.get_piece_size()
        own = [AddedToken(self.model.id_to_piece(i), i) for i in range(pieces)
               if self.model.is_control(i) or self.model.is_unknown(i)]
        declared = list(added)
        taken = {token.id for token in declared}
        self.added = {token.content: token for token in [*(t for t in own if t.id not in taken), *declared]}
        self.size = max(pieces, 1 + max((token.id for token in declared), default=-1))
        self.spelling = Spelling(strip=int(self.model.encode('a', out_type=str)[0].startswith('\u2581')))
        self._by_id = {token.id: token for token in self.added.values()}
        self._pieces = pieces
        self._prefix_after_added = prefix_after_added
        # White space and words that were added are left to the model, which knows them as pieces.
        outside = {t.content: t for t in self.added.values() if t.is_control or t.id >= pieces}
        self._outside, self._pattern = outside, longest_first(outside)

    def encode(self, text: str) -> list[int]:
        return compose(self, text, find_anchors(self._pattern, self._outside, text, 0, len(text)))

    def encode_section(self, text: str, place: Place) -> list[int]:
        inside = place is Place.INSIDE or (place is Place.AFTER and not self._prefix_after_added)
        return (self._inside if inside else self.model).encode(text, out_type=int)

    def piece(self, token: int) -> str | None:
        if token in self._by_id:
            return self._by_id[token].content
        return self.model.id_to_piece(token) if 0 <= token < self._pieces else None

    def token_bytes(self, token: int, first: bool = False) -> bytes:
        if token in self._by_id:
            return self._by_id[token].content.encode()
        piece = self.piece(token)
        return b'' if piece is None else byte_fallback_speller(piece)

    def find(self, piece: str) -> int | None:
        if piece in self.added:
            return self.added[piece].id
        token = self.model.piece_to_id(piece)
        return token if self.model.id_to_piece(token) == piece else None

    def control_pieces(self) -> Iterable[str]:
        """The model's own names of ids that an added token renames (InternLM2's ``[UNUSED_TOKEN_145]``)."""
        return [self.model.id_to_piece(t.id) for t in self.added.values() if t.is_control and t.id < self._pieces]


def load_spm(path: Path, settings: Settings) -> SpmVocabulary:
    """Read a tokenizer.model; completes ``settings`` with what the model says of itself.

    Raises:
        LoadError: LMD-151, LMD-154.
    """
    after = settings.legacy
    if after is None:  # the Llama class of transformers 5 turned it off; other classes encode every section by itself
        after = settings.tokenizer_class != 'LlamaTokenizer'
    model = path.read_bytes()
    processor = _processor(model, str(path))
    added = {token.content: token for token in settings.added}
    for content in [*settings.named.values(), *settings.extra_special]:
        token = processor.piece_to_id(content)
        if content not in added and processor.id_to_piece(token) == content:
            added[content] = AddedToken(content, token)
    for name in ('bos', 'eos', 'unk', 'pad'):
        token = getattr(processor, f'{name}_id')()
        if token >= 0:
            settings.named.setdefault(f'{name}_token', processor.id_to_piece(token))
    if settings.add_bos is None:
        settings.add_bos = True  # what every class of these vocabularies does by default
    return SpmVocabulary(model, str(path), added.values(), after)


def spm_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], add_prefix: bool) -> bytes:
    """A serialised SentencePiece BPE model with these pieces and no text normalisation."""
    spec = _field(3, 2) + _field(4, len(tokens)) + _field(35, int(BYTE in types))  # model_type BPE, byte_fallback
    normalizer = _field(1, b'identity') + _field(3, int(add_prefix)) + _field(4, 0) + _field(5, 1)
    pieces = [_field(1, _piece(*entry)) for entry in zip(tokens, scores, types, strict=True)]
    return b''.join([*pieces, _field(2, spec), _field(3, normalizer)])


def _piece(token: str, score: float, kind: int) -> bytes:
    return _field(1, token.encode()) + b'\x15' + struct.pack('<f', score) + _field(3, kind)


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _processor(model: bytes, origin: str) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise LoadError('LMD-154', file=origin) from error
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, TypeError) as error:
        raise LoadError('LMD-151', file=origin, reason='it is not a SentencePiece model') from error
    if not processor.get_piece_size():
        raise LoadError('LMD-151', file=origin, reason='it holds no pieces')
    return processor
