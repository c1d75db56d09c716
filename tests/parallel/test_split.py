"""Shares of a layer: together they are the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.parallel.group import ALONE, Group
from lmdeploy.parallel.split import share


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 16))
def test_shares_are_the_whole_in_order(units, unit, size):
    if units < size:
        return
    parts = [share(units * unit, rank, size, unit) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(units * unit))
    assert all(len(part) % unit == 0 for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= unit


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_fewer_units_than_ranks_are_replicated_evenly(units, copies, unit):
    size = units * copies
    parts = [share(units * unit, rank, size, unit) for rank in range(size)]
    assert parts == [range(i * unit, (i + 1) * unit) for i in range(units) for _ in range(copies)]


def test_impossible_shares():
    with pytest.raises(ValueError, match='whole units'):
        share(100, 0, 2, 64)
    with pytest.raises(ValueError, match='replicated'):
        share(3, 0, 4)


def test_a_group_of_one_does_nothing():
    x = torch.ones(3)
    assert ALONE.all_reduce(x) is x and ALONE.all_gather(x) is x and ALONE.broadcast(x) is x
    with pytest.raises(ValueError, match='transport'):
        Group(0, 2)
