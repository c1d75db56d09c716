"""Decoding by concatenated bytes is what the library's decoders give."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.tokenizer.detokenize import Detokenizer
from lmdeploy.tokenizer.fast import FastVocabulary
from lmdeploy.tokenizer.spelling import byte_alphabet

PIECES = ['<s>', '\u2581', '\u2581\u2581', '\u2581the', 'the', 'a', '##ing', '.', '!', "'", "'s", "n't", '中', '<0x41>',
          '<0xE4>', '<0xB8>', '<0xAD>', 'do', 'not', '\u0120x', '\u00e9', 'é']
REPLACE = {'type': 'Replace', 'pattern': {'String': '\u2581'}, 'content': ' '}
DECODERS = {
    'byte level': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True},
    'llama': {'type': 'Sequence', 'decoders': [
        REPLACE, {'type': 'ByteFallback'}, {'type': 'Fuse'}, {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]},
    'gemma': {'type': 'Sequence', 'decoders': [REPLACE, {'type': 'ByteFallback'}, {'type': 'Fuse'}]},
    'metaspace': {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'always', 'split': True},
    'metaspace, no prefix': {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'never', 'split': True},
    'word piece': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
    'word piece, spaces kept': {'type': 'WordPiece', 'prefix': '##', 'cleanup': False},
}


class _Tokenizer:
    """As much of a tokenizer as a detokenizer reads."""

    def __init__(self, vocabulary: FastVocabulary) -> None:
        self.vocabulary = vocabulary
        self.special_ids = frozenset(token.id for token in vocabulary.added.values() if token.special)


@pytest.mark.parametrize('name', DECODERS)
def test_streams_equal_the_library(name):
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(PIECES))}
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    full = tokenizers.Tokenizer.from_str(json.dumps({
        'version': '1.0', 'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': 'a'},
        'added_tokens': [flags | {'id': 0, 'content': '<s>', 'special': True}], 'normalizer': None,
        'pre_tokenizer': None, 'post_processor': None, 'decoder': DECODERS[name]}))
    tokenizer = _Tokenizer(FastVocabulary(full, 'x'))

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.sampled_from(range(len(vocab))), max_size=12), st.booleans())
    def law(ids, skip):
        expected = full.decode(ids, skip_special_tokens=skip)
        stream = Detokenizer(tokenizer, skip)
        text = ''.join(stream.push([i]) for i in ids) + stream.flush()
        # of ill-formed bytes the library's byte fallback rejects all neighbours too; ours only the ill-formed ones
        if '\ufffd' not in expected or name == 'byte level':
            assert text == expected

    law()


def test_byte_alphabet_is_the_library_s():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    cut = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ('a é', '中\n', '\0\x7f'):
        written = cut.pre_tokenize_str(text)[0][0]
        assert bytes(alphabet[char] for char in written) == text.encode()
