"""From a decoder's description to the bytes of single tokens.

Decoding is a concatenation: every token adds bytes that depend on nothing but the token (and on whether it is the
first of the text), and the whole is read as UTF-8 with one U+FFFD for each ill-formed part, as the Unicode standard
recommends. This is what makes streams exact: no text is ever decoded twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lmdeploy.errors import LoadError
from lmdeploy.tokenizer.vocabulary import Spelling

Speller = Callable[[str, bool], bytes]  # (piece, first) -> bytes
_BYTE = re.compile(r'<0x([0-9A-Fa-f]{2})>')


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters by which byte-level vocabularies write bytes (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the other 68, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def byte_speller(decoder: dict, origin: str) -> tuple[Spelling, Speller]:
    """The speller of a ``tokenizers`` decoder given as its JSON state.

    Raises:
        LoadError: LMD-161: the decoder does not work token by token.
    """
    kind = decoder.get('type')
    if kind == 'ByteLevel':
        return Spelling(), _byte_level()
    if kind == 'Metaspace':
        return Spelling(), _metaspace(decoder)
    if kind == 'WordPiece':
        return Spelling(), _word_piece(decoder)
    if kind == 'Sequence':
        return _sequence(decoder.get('decoders', []), origin)
    raise LoadError('LMD-161', file=origin, decoder=kind)


def byte_fallback_speller(piece: str, first: bool = False) -> bytes:
    """SentencePiece's spelling: U+2581 is a space, ``<0xAB>`` a byte."""
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace('\u2581', ' ').encode()


def _byte_level() -> Speller:
    alphabet = byte_alphabet()

    def spell(piece: str, first: bool) -> bytes:
        try:
            return bytes([alphabet[char] for char in piece])
        except KeyError:  # an added token, which is written as it is
            return piece.encode()
    return spell


def _metaspace(decoder: dict) -> Speller:
    mark = decoder.get('replacement', '\u2581')
    prefixed = decoder.get('prepend_scheme', 'always') != 'never'

    def spell(piece: str, first: bool) -> bytes:
        return piece.replace(mark, '' if first and prefixed else ' ').encode()
    return spell


def _word_piece(decoder: dict) -> Speller:
    prefix, cleanup = decoder.get('prefix', '##'), decoder.get('cleanup', True)
    clean = ((' .', '.'), (' ?', '?'), (' !', '!'), (' ,', ','), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (' do not', " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))

    def spell(piece: str, first: bool) -> bytes:
        if not first:
            piece = piece.removeprefix(prefix) if piece.startswith(prefix) else ' ' + piece
        for old, new in clean if cleanup else ():
            piece = piece.replace(old, new)
        return piece.encode()
    return spell


def _sequence(steps: list[dict], origin: str) -> tuple[Spelling, Speller]:
    replaces: list[tuple[str, str]] = []
    byte_fallback = byte_level = False
    strip = 0
    for step in steps:
        kind = step.get('type')
        if kind == 'Replace' and isinstance(step.get('pattern'), dict) and 'String' in step['pattern']:
            replaces.append((step['pattern']['String'], step['content']))
        elif kind == 'ByteFallback':
            byte_fallback = True
        elif kind == 'ByteLevel':
            byte_level = True
        elif kind == 'Strip' and step.get('content') == ' ' and not step.get('stop'):
            strip = step.get('start', 0)
        elif kind != 'Fuse':
            raise LoadError('LMD-161', file=origin, decoder=kind)
    if byte_level:
        return Spelling(strip), _byte_level()

    def spell(piece: str, first: bool) -> bytes:
        match = _BYTE.fullmatch(piece) if byte_fallback else None
        if match:
            return bytes([int(match[1], 16)])
        for old, new in replaces:
            piece = piece.replace(old, new)
        return piece.encode()
    return Spelling(strip), spell
