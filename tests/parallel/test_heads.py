"""Heads over ranks: every query head once, beside its key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.parallel.heads import share_heads


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_every_query_head_is_computed_once_and_with_its_key(kv_heads, group, size):
    heads = kv_heads * group
    shares = [share_heads(heads, kv_heads, rank, size) for rank in range(size)]
    assert sorted(head for share in shares for head in share.queries if head >= 0) == list(range(heads))
    for share in shares:
        each, rest = divmod(len(share.queries), len(share.keys))
        assert rest == 0
        for place, head in enumerate(share.queries):
            assert head < 0 or share.keys[place // each] == head // group
        assert len(set(share.keys)) == len(share.keys)


def test_usual_models():
    assert [share_heads(32, 8, rank, 2).keys for rank in range(2)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [share_heads(28, 4, rank, 8).queries for rank in (0, 1)] == [(0, 1, 2, 3), (4, 5, 6)]
    # 14 query heads of 2 keys over 3 ranks: the middle one has heads of both, and one of zeros
    assert [len(share_heads(14, 2, rank, 3).queries) for rank in range(3)] == [5, 6, 4]
    assert share_heads(14, 2, 1, 3).queries == (5, 6, -1, 7, 8, 9)
    assert share_heads(2, 1, 2, 3).queries == (-1,)


def test_keys_that_serve_unequally_many_queries():
    with pytest.raises(ValueError, match='10 query heads over 4'):
        share_heads(10, 4, 0, 2)
