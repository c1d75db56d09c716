"""The package ``llguidance``: how it is loaded, the options and limits it is given, and its failures as errors.

Nothing here imports anything of lmdeploy but the errors, so that the process of the sandbox starts fast.
"""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

from lmdeploy.errors import RequestError

# JSON as people and models write it: a space, or a line break with its indentation, at the places where white space
# may be. Unbounded white space would let a small model write spaces for ever. In free strings no \uXXXX is written:
# it is needed for control characters only, and a key must not come twice in two spellings.
JSON_OPTIONS = {'whitespace_pattern': r' |\r?\n( {0,40}|\t{0,10})', 'json_allowed_escapes': 'nrbtf\\"',
                'lenient': False, 'coerce_one_of': False}
# A lexer state is 1 to 2 KB; 1,000 optional properties are 4,000 items. The defaults bound the time of a step.
LIMITS = {'max_lexer_states': 50_000, 'max_items_in_row': 5_000, 'verbose_errors': False}


def load() -> ModuleType:
    """The package.

    Raises:
        RequestError: LMD-327 if it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise RequestError('LMD-327') from error
    return llguidance


def build(vocabulary: Any, kind: str, text: str) -> Any:
    """An ``LLMatcher`` at the start of a grammar, of which the first step was tried: what is lazy exists already.

    Args:
        vocabulary: an ``LLTokenizer``.
        kind, text: those of a :class:`lmdeploy.grammar.formats.Source`.

    Raises:
        RequestError: LMD-325 with the reason.
    """
    library = load()
    try:
        if kind == 'json':
            # as a text inside: only there is it never taken for a schema's own options
            grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
        else:
            grammar = library.LLMatcher.grammar_from_regex(text)
        matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=library.LLParserLimits(**LIMITS))
        reason = matcher.get_error() or '; '.join(matcher.get_grammar_warnings()) or _try(matcher)
    except BaseException as error:  # a panic of the library is no Exception
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = f'{type(error).__name__}: {error}'
    if reason:
        raise RequestError('LMD-325', reason=first_line(reason))
    return matcher


def _try(matcher: Any) -> str:
    """Why the first step fails; empty if it works. Limits that the first mask exceeds show with its first token."""
    mask = matcher.compute_bitmask()
    if not matcher.is_error():
        byte = next((i for i, byte in enumerate(mask) if byte), None)
        if byte is None:
            return 'no text matches it'
        bit = mask[byte] & -mask[byte]
        matcher = matcher.deep_copy()
        matcher.consume_token(8 * byte + bit.bit_length() - 1)
    return matcher.get_error()


def is_panic(error: BaseException) -> bool:
    """Whether the library failed an assertion of its own; its class is not exported."""
    return type(error).__name__ == 'PanicException'


def first_line(text: str) -> str:
    """What is for people in an error text of the library."""
    line = text.strip().split('\n', 1)[0]
    return line if len(line) <= 160 else line[:157] + '...'


class ByteVocabulary:
    """A vocabulary of the 256 bytes and one end token, in the form that ``LLTokenizer`` takes."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256
    special_token_ids = [256]
    tokens = [bytes([byte]) for byte in range(256)] + [b'<end>']

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def byte_vocabulary() -> Any:
    """An ``LLTokenizer`` of bytes, built in a millisecond."""
    return load().LLTokenizer(ByteVocabulary(), n_vocab=257, eos_token=[256])


def reason_of(request: str) -> str | None:
    """Why a grammar, sent as JSON ``[kind, text]``, cannot be compiled; None if it can."""
    kind, text = json.loads(request)
    try:
        build(byte_vocabulary(), kind, text)
    except RequestError as error:
        return str(error.params.get('reason', error))
    return None
