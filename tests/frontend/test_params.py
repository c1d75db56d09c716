"""GenerationConfig -> SamplingParams: ranges, end tokens, seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.frontend.params import check, resolve

VOCAB = 100


class Letters:
    """A tokenizer with two control tokens."""

    vocab_size = VOCAB
    eos_token_ids = frozenset({1})
    control_tokens = {'<eos>': 1, '<|end|>': 2}

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def resolved(stops=(), **options):
    config = GenerationConfig(**options)
    check(config, VOCAB)
    return resolve(config, Letters(), stops, prompt_len=10, session_len=64)


BAD = [
    ('temperature', math.nan), ('temperature', math.inf), ('temperature', -0.1), ('temperature', 2.1),
    ('temperature', 'hot'), ('temperature', None), ('temperature', True), ('top_p', 0), ('top_p', 1.01),
    ('top_p', math.nan), ('top_k', -1), ('top_k', 1.5), ('top_k', VOCAB + 1), ('min_p', -0.5), ('min_p', 2),
    ('repetition_penalty', 0), ('repetition_penalty', 11),
    ('repetition_penalty', 1e-300), ('repetition_penalty', math.nan), ('presence_penalty', 3),
    ('frequency_penalty', -3), ('n', 0), ('n', 129), ('n', None), ('max_new_tokens', -1), ('max_new_tokens', 2.0),
    ('min_new_tokens', -1), ('random_seed', 'x'), ('logprobs', -1), ('logprobs', VOCAB + 1), ('stop_words', 'text'),
    ('stop_words', ['']), ('stop_words', ['x'] * 129), ('stop_words', [3]), ('bad_words', ['y' * 2000]),
    ('stop_token_ids', [VOCAB]), ('bad_token_ids', [-1]), ('bad_token_ids', 3), ('logit_bias', {VOCAB: 1.0}),
    ('logit_bias', {3: math.nan}), ('logit_bias', {3: 101}), ('logit_bias', [3]), ('output_logits', 'some'),
    ('return_ppl', True), ('repetition_ngram_size', 3), ('logprob_start_len', 0), ('with_cache', True),
    ('do_sample', 'yes'), ('ignore_eos', 1), ('logits_processors', [3]), ('response_format', {'type': 'xml'}),
]


@pytest.mark.parametrize(('field', 'value'), BAD, ids=[f'{f}={v!r}'[:40] for f, v in BAD])
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(RequestError) as caught:
        check(GenerationConfig(**{field: value}), VOCAB)
    assert field in str(caught.value)


def test_something_else_than_a_config_is_refused():
    with pytest.raises(RequestError, match='LMD-314'):
        check({'top_k': 3}, VOCAB)


NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.floats(0, 1e-30), st.text(max_size=4))


FIELDS = ['n', 'max_new_tokens', 'min_new_tokens', 'top_k', 'top_p', 'min_p', 'temperature', 'logprobs', 'random_seed',
          'repetition_penalty', 'presence_penalty', 'frequency_penalty']


@given(field=st.sampled_from(FIELDS), value=NUMBERS)
def test_whatever_passes_the_check_resolves_to_finite_numbers(field, value):
    config = GenerationConfig(**{field: value}, do_sample=True)
    try:
        check(config, VOCAB)
    except RequestError:
        return
    for params in resolve(config, Letters(), (), prompt_len=1, session_len=64)[0]:
        numbers = (params.temperature, params.top_p, params.min_p, params.repetition_penalty)
        assert all(math.isfinite(x) for x in numbers)
        for divisor in (params.temperature, params.repetition_penalty):
            assert 1e-5 <= np.float32(divisor) < 11
        assert 0 <= params.seed < 2**64


def test_greedy_is_the_default_and_sampling_must_be_asked_for():
    (greedy,), _ = resolved(temperature=0.6, top_k=40, top_p=0.8)
    assert greedy.greedy
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (1.0, 0, 1.0)
    (sampled,), _ = resolved(do_sample=True, temperature=0.6, top_k=40, top_p=0.8)
    assert not sampled.greedy
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.6, 40, 0.8)
    for cold in (0.0, 5e-324, 4.8e-300, 1e-46, 1e-45, 9e-6):  # in single precision some of them are 0
        (params,), _ = resolved(do_sample=True, temperature=cold)
        assert params.greedy and params.temperature == 1.0
    assert not resolved(do_sample=True, temperature=1e-5)[0][0].greedy


def test_end_tokens_come_from_tokenizer_template_and_request_together():
    (params,), rules = resolved(stops=['<|end|>', 'USER:'], stop_words=['\n\n'], stop_token_ids=[9])
    assert params.stop_ids == (1, 2, 9)
    assert rules.stops == ('USER:', '\n\n')


def test_ignore_eos_bans_the_end_tokens():
    (params,), _ = resolved(stops=['<|end|>'], ignore_eos=True)
    assert params.stop_ids == ()
    assert params.banned_ids == (1, 2)


def test_max_new_tokens_none_is_the_rest_of_the_session():
    assert resolved(max_new_tokens=None)[0][0].max_new_tokens == 54


def test_n_answers_have_n_seeds_and_a_given_seed_is_kept():
    choices, _ = resolved(n=3, do_sample=True, random_seed=-1)
    assert [c.seed for c in choices] == [2**64 - 1, 0, 1]
    assert resolved(do_sample=True)[0][0].seed != resolved(do_sample=True)[0][0].seed
