"""Shares of a layer: together they are the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.parallel.split import UNIT, share, share_channels


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 16))
def test_shares_are_the_whole_in_order(units, unit, size):
    parts = [share(units * unit, rank, size, unit) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(units * unit))
    assert all(len(part) % unit == 0 for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= unit


@given(st.integers(1, 20000), st.integers(1, 16))
def test_every_rank_has_channels(features, size):
    if features < size:
        with pytest.raises(ValueError, match='over'):
            share_channels(features, 0, size)
        return
    parts = [share_channels(features, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(features))
    assert min(map(len, parts)) > 0
    if features % UNIT == 0 and features >= UNIT * size:
        assert all(part.start % UNIT == 0 for part in parts)


def test_features_that_are_no_whole_units():
    with pytest.raises(ValueError, match='whole units'):
        share(100, 0, 2, 64)
