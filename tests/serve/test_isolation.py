"""Keys are apart: what one has asked is in no cached prefix of another, unless the operator shares them."""

from __future__ import annotations

import itertools

import pytest

from lmdeploy.serve.auth import KeyRing
from tests.serve.fake_server import MODEL

PROMPT = 'a confidential sentence of some length, which is the same in all requests; ' * 2
BODIES = {
    '/v1/chat/completions': {'model': MODEL, 'messages': [{'role': 'user', 'content': PROMPT}], 'max_tokens': 4},
    '/v1/completions': {'model': MODEL, 'prompt': PROMPT, 'max_tokens': 4},
    '/generate': {'prompt': PROMPT, 'max_tokens': 4},
}


def cached(answer: dict) -> int:
    """How many tokens of the prompt came from the prefix cache."""
    if 'meta_info' in answer:
        return answer['meta_info']['cached_tokens']
    return answer['usage']['prompt_tokens_details']['cached_tokens']


@pytest.mark.parametrize('path', BODIES)
@pytest.mark.parametrize('shared', [False, True])
def test_no_prefix_of_one_key_is_found_with_another(serve, path, shared):
    server = serve(keys=KeyRing(['a', 'b'], ['boss']), share_prefix_cache=shared, prefix_caching=True)

    def ask(key: str) -> int:
        answer = server.post(path, BODIES[path], headers={'x-api-key': key})
        assert answer.status_code == 200, answer.text
        return cached(answer.json())

    first, again = ask('a'), ask('a')
    assert first == 0 and again >= 96  # all whole blocks but the last
    for key in ('b', 'boss'):
        assert ask(key) == (again if shared else 0)
        assert ask(key) == again  # its own
    assert ask('a') == again  # nothing of the others has taken its place


def test_keys_never_have_a_salt_in_common():
    ring = KeyRing([f'key{i}' for i in range(200)], ['boss'])
    callers = [key.caller for key in ring._keys]
    assert all(caller.keyed and len(caller.salt) == 16 for caller in callers)
    assert all(a.salt != b.salt and a.id != b.id for a, b in itertools.combinations(callers, 2))
