"""Streams of text: exact, never half a character, and O(1) for each token."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.tokenizer import DetokenizeState
from lmdeploy.tokenizer.detokenize import Detokenizer
from tests.tokenizer.conftest import KINDS
from tests.tokenizer.corpus import lines


def chunks(ids, cuts):
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in zip(edges, edges[1:])]


@pytest.mark.parametrize('kind', KINDS)
def test_pushes_and_flush_are_the_decoded_whole(tokenizers, kind):
    tokenizer = tokenizers[kind]
    half = [i for i in range(tokenizer.vocab_size) if not is_text(tokenizer.token_bytes(i))]
    token = st.one_of(st.integers(0, tokenizer.vocab_size + 3), st.sampled_from(half),
                      st.sampled_from(sorted(tokenizer.special_ids)))

    @settings(max_examples=300, deadline=None)
    @given(ids=st.lists(token, max_size=24), cuts=st.lists(st.integers(0, 100), max_size=6), skip=st.booleans())
    def law(ids, cuts, skip):
        stream = Detokenizer(tokenizer, skip)
        parts = [stream.push(chunk) for chunk in chunks(ids, cuts)]
        assert ''.join(parts) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)

    law()


@pytest.mark.parametrize('kind', KINDS)
def test_a_stream_of_real_text_never_shows_a_replacement_character(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for line in lines(400):
        if '\ufffd' in line:
            continue
        stream = Detokenizer(tokenizer)
        shown = ''.join(stream.push([i]) for i in tokenizer.encode(line, add_bos=False))
        assert '\ufffd' not in shown
        assert stream.flush() == ''


def test_decoding_gives_the_text_back(tokenizers):
    import unicodedata

    for kind, tokenizer in tokenizers.items():
        for line in lines(500):
            expected = unicodedata.normalize('NFC', line) if kind == 'qwen2' else line.replace('\u2581', ' ')
            if kind == 'prepend':  # a prefix space after every added token cannot be told from one of the text
                expected = expected if not any(t in line for t in tokenizer.added_tokens) else None
            text = tokenizer.decode(tokenizer.encode(line), skip_special_tokens=False)
            if tokenizer.add_bos:
                text = text.removeprefix('<s>').removeprefix(' ')
            if expected is not None and not (tokenizer.add_bos and line.startswith((' ', '\u2581', '<'))):
                assert text == expected


def test_dangling_bytes_become_one_replacement_character(tokenizers):
    tokenizer = tokenizers['qwen2']
    ids = tokenizer.encode('a\U00013000', add_bos=False)
    stream = Detokenizer(tokenizer)
    assert len(ids) > 2 and stream.push(ids[:-1]) == 'a'
    assert stream.flush() == '\ufffd'
    assert tokenizer.decode(ids[:-1]) == 'a\ufffd'


def test_an_answer_that_continues_a_text_keeps_its_space(tokenizers):
    tokenizer = tokenizers['llama']
    prompt, both = tokenizer.encode('the'), tokenizer.encode('the naïve')
    new = both[len(prompt):]
    assert tokenizer.token_piece(new[0]).startswith('\u2581')
    assert Detokenizer(tokenizer).push(new) == 'naïve'
    assert Detokenizer(tokenizer, continues=True).push(new) == ' naïve'
    assert tokenizer.decode(new) == 'naïve'


@pytest.mark.parametrize('kind', KINDS)
def test_incremental_decoding_with_a_state(tokenizers, kind):
    tokenizer, rng = tokenizers[kind], random.Random(0)
    for line in lines(150):
        prompt, ids = tokenizer.encode('prompt'), tokenizer.encode(line, add_bos=False)
        state, text, seen = DetokenizeState(len(prompt)), '', len(prompt)
        while seen < len(prompt) + len(ids):
            seen = min(len(prompt) + len(ids), seen + rng.randint(1, 4))
            piece, state = tokenizer.detokenize_incrementally((prompt + ids)[:seen], state, skip_special_tokens=False)
            text += piece
            assert state.ids_offset == seen
        whole = Detokenizer(tokenizer, False, continues=True)
        assert text == whole.push(ids)


def test_offset_and_unknown_ids(tokenizers):
    tokenizer = tokenizers['qwen2']
    ids = tokenizer.encode('hello world')
    assert tokenizer.decode(ids, offset=1) == tokenizer.decode(ids[1:])
    assert tokenizer.decode([*ids, 10**6, -1, 1 << 40]) == 'hello world'
    assert tokenizer.decode([]) == ''


def is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
