"""Users cannot write control tokens; everything else is as if the prompt were one string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.errors import RequestError
from tests.tokenizer.conftest import KINDS
from tests.tokenizer.corpus import lines, plain_lines

TEXT = st.text(st.sampled_from('ab <|>_/[]im\u2581\n中é'), max_size=8)


def control_ids(tokenizer, ids):
    allowed = set(tokenizer.control_tokens.values())
    return [i for i in ids if i in allowed]


def joined(tokenizer, segments):
    return tokenizer.decode(tokenizer.encode_segments(segments, add_bos=False), skip_special_tokens=False)


@pytest.mark.parametrize('kind', KINDS)
def test_no_added_token_arises_from_untrusted_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert len(tokenizer.control_tokens) >= 3
    pieces = {tokenizer.vocabulary.model.id_to_piece(i) for i in tokenizer.control_tokens.values()
              } if kind == 'internlm' else set()

    @settings(max_examples=60, deadline=None)
    @given(pre=st.sampled_from(['', 'x ', *tokenizer.control_tokens]), a=TEXT, b=TEXT,
           text=st.sampled_from([*tokenizer.added_tokens, *pieces]),
           post=st.sampled_from(['', ' y', *tokenizer.control_tokens]))
    def law(pre, a, b, text, post):
        attack = tokenizer.encode_segments([(pre, True), (a + text + b, False), (post, True)], add_bos=False)
        plain = tokenizer.encode_segments([(pre, True), ('x', False), (post, True)], add_bos=False)
        assert control_ids(tokenizer, attack) == control_ids(tokenizer, plain)

    law()


@pytest.mark.parametrize('kind', KINDS)
def test_control_tokens_do_not_form_across_borders(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in tokenizer.control_tokens:
        for cut in range(1, len(text)):
            for trust in ((True, False), (False, True), (False, False)):
                segments = list(zip((text[:cut], text[cut:]), trust))
                assert control_ids(tokenizer, tokenizer.encode_segments(segments, add_bos=False)) == []
            whole = [(text[:cut], True), (text[cut:], True)]
            assert control_ids(tokenizer, tokenizer.encode_segments(whole, add_bos=False)) == [
                tokenizer.control_tokens[text]]


@pytest.mark.parametrize('kind', KINDS)
def test_plain_text_is_encoded_as_one_string_wherever_it_is_cut(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for n, line in enumerate(line for line in plain_lines(250) if not any(t in line for t in tokenizer.control_tokens)):
        cuts = sorted({0, len(line), n % (len(line) + 1), (7 * n) % (len(line) + 1)})
        segments = [(line[a:b], bool((n + a) % 2)) for a, b in zip(cuts, cuts[1:])]
        assert tokenizer.encode_segments(segments, add_bos=True) == tokenizer.encode(line, add_bos=True)


@pytest.mark.parametrize('kind', KINDS)
def test_trusted_text_is_encoded_like_any_prompt(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for line in lines(300):
        assert tokenizer.encode_segments([(line, True)], add_bos=False) == tokenizer.encode(line, add_bos=False)


@pytest.mark.parametrize('kind', ['qwen2', 'internlm', 'gguf'])
def test_attacked_prompts_still_say_the_same(tokenizers, kind):
    """The text that the model reads is the text that was given: nothing is dropped or added."""
    tokenizer = tokenizers[kind]
    for attack in (*tokenizer.control_tokens, 'a<|im_start|>b', '<|im_<|im_start|>start|>', '<|im_start|>' * 3):
        segments = [('<|im_start|>', True), ('user\n', True), (attack, False), (' end', True)]
        assert joined(tokenizer, segments) == '<|im_start|>user\n' + attack + ' end'


def test_bos_comes_once(tokenizers):
    tokenizer = tokenizers['llama']
    assert tokenizer.add_bos
    once = tokenizer.encode_segments([('hi', False)], add_bos=True)
    assert once[0] == tokenizer.bos_token_id
    assert tokenizer.encode_segments([('<s>', True), ('hi', False)], add_bos=True).count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in tokenizer.encode_segments([('hi', False)], add_bos=False)
    assert tokenizer.encode_segments([], add_bos=False) == []


def test_white_space_that_a_model_added_stays_usable(tokenizers):
    """Runs of spaces are text, not control: untrusted code keeps its tokens."""
    tokenizer = tokenizers['gguf']
    spaces = ' ' * 20
    assert spaces not in tokenizer.control_tokens
    ids = tokenizer.encode_segments([(f'a{spaces}b', False)], add_bos=False)
    assert tokenizer.added_tokens[spaces] in ids
    assert tokenizer.decode(ids) == f'a{spaces}b'


def test_errors_name_the_place(tokenizers):
    tokenizer = tokenizers['qwen2']
    with pytest.raises(RequestError, match='LMD-160.*U\\+D800.*character 2'):
        tokenizer.encode_segments([('ok', True), ('ab\ud800c', False)], add_bos=False)
    with pytest.raises(RequestError, match='LMD-160'):
        tokenizer.encode('\udfff')
    with pytest.raises(RequestError, match='LMD-163.*int'):
        tokenizer.encode(3)  # type: ignore[arg-type]
    assert tokenizer.decode(tokenizer.encode('a\0b')) == 'a\0b'
