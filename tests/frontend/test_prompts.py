"""Every prompt form of the public interface, and everything else as an error in its place."""

from __future__ import annotations

import pytest

from lmdeploy.errors import RequestError
from lmdeploy.frontend.prompts import Prompt, classify

HELLO = [{'role': 'user', 'content': 'hello'}]


@pytest.mark.parametrize(('given', 'prompts', 'single'), [
    ('hello', [Prompt(text='hello')], True),
    (HELLO, [Prompt(messages=HELLO)], True),
    ([1, 2], [Prompt(token_ids=[1, 2])], True),
    (['a', 'b'], [Prompt(text='a'), Prompt(text='b')], False),
    ([HELLO, HELLO], [Prompt(messages=HELLO)] * 2, False),
    ([[1], 'a', HELLO], [Prompt(token_ids=[1]), Prompt(text='a'), Prompt(messages=HELLO)], False),
    ([], [], False),
])
def test_known_forms(given, prompts, single):
    assert classify(given) == (prompts, single)


@pytest.mark.parametrize('given', [None, 3, 2.5, b'bytes', {'role': 'user'}, object()])
def test_a_single_prompt_of_no_known_form_is_one_error(given):
    (error,), single = classify(given)
    assert single
    assert isinstance(error, RequestError)
    assert error.code == 'LMD-303'


def test_a_bad_prompt_in_a_batch_spoils_only_its_place():
    prompts, single = classify(['a', None, [], [True, 2], ('look', 'image.png'), 'b'])
    assert not single
    codes = [p.code if isinstance(p, RequestError) else p for p in prompts]
    assert codes == [Prompt(text='a'), 'LMD-303', 'LMD-303', 'LMD-303', Prompt(text='look', images=('image.png',)),
                     Prompt(text='b')]
