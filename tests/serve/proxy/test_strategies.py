"""Strategies as laws: every node once, the best first, in proportion to speed, and next to nothing moves."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.serve.proxy.addresses import NodeAddress
from lmdeploy.serve.proxy.nodes import LATENCY_SECONDS, Node
from lmdeploy.serve.proxy.strategies import OVERLOAD, SLACK, STRATEGIES, by_prefix

KEYS = [b'key-%d' % i for i in range(3000)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fleet(size: int, speeds: list[float | None] | None = None, clock: Clock | None = None) -> list[Node]:
    return [Node(NodeAddress('http', f'10.0.0.{i + 1}', 80), ('m',), speed, clock=clock or Clock())
            for i, speed in zip(range(size), speeds or [None] * size)]


loads = st.lists(st.tuples(st.integers(0, 50), st.none() | st.floats(0.1, 100)), min_size=1, max_size=9)


@given(loads, st.sampled_from(sorted(STRATEGIES)), st.binary(max_size=64), st.integers())
def test_every_node_comes_once(given_loads, name, key, seed):
    nodes = fleet(len(given_loads), [speed for _, speed in given_loads])
    for node, (load, _) in zip(nodes, given_loads):
        node.unfinished = load
    order = STRATEGIES[name](nodes, key, random.Random(seed))
    assert sorted(map(id, order)) == sorted(map(id, nodes))
    assert order == STRATEGIES[name](nodes, key, random.Random(seed))


@given(loads, st.integers())
def test_expected_latency_is_least_work_per_speed(given_loads, seed):
    nodes = fleet(len(given_loads), [speed for _, speed in given_loads])
    known = [speed for _, speed in given_loads if speed is not None]
    mean = sum(known) / len(known) if known else 1.0
    for node, (load, _) in zip(nodes, given_loads):
        node.unfinished = load
    order = STRATEGIES['min_expected_latency'](nodes, b'', random.Random(seed))
    costs = [node.unfinished / (node.speed or mean) for node in order]
    assert costs == sorted(costs)


def test_random_is_in_proportion_to_speed():
    nodes, chance = fleet(3, [1.0, 3.0, None]), random.Random(7)  # the third counts as 2
    firsts = Counter(STRATEGIES['random'](nodes, b'', chance)[0].url for _ in range(6000))
    for node, share in zip(nodes, (1 / 6, 3 / 6, 2 / 6)):
        assert abs(firsts[node.url] / 6000 - share) < 0.03


def test_ties_are_decided_by_chance():
    nodes, chance = fleet(4), random.Random(1)
    for name in ('min_expected_latency', 'min_observed_latency'):
        firsts = Counter(STRATEGIES[name](nodes, b'', chance)[0].url for _ in range(400))
        assert len(firsts) == 4 and min(firsts.values()) > 60


def test_observed_latency():
    """The quickest first; a new node is tried; a slow one gets another chance when its observations are old."""
    clock = Clock()
    slow, quick, new = fleet(3, clock=clock)
    slow.finished(9.0)
    quick.finished(1.0)
    quick.finished(2.0)
    strategy, chance = STRATEGIES['min_observed_latency'], random.Random(1)
    new.finished(5.0)
    assert strategy([slow, new, quick], b'', chance) == [quick, new, slow]
    new.latencies.clear()
    new.unfinished, quick.unfinished = 1, 2
    assert strategy([slow, quick, new], b'', chance)[2] is slow
    quick.unfinished = 0
    clock.now += LATENCY_SECONDS / 2
    quick.finished(1.5)
    clock.now += LATENCY_SECONDS * 0.75
    assert slow.latency is None and quick.latency == 1.5
    slow.unfinished, new.unfinished, quick.unfinished = 0, 1, 1
    assert strategy([quick, new, slow], b'', chance)[0] is slow


@given(st.integers(1, 12), st.binary(min_size=1, max_size=64), st.integers(), st.randoms(use_true_random=False))
def test_one_key_has_one_order(size, key, seed, shuffler):
    """It depends on the key and the nodes' URLs: not on chance, nor on the order in which nodes came."""
    nodes = fleet(size)
    order = by_prefix(nodes, key, random.Random(seed))
    shuffled = nodes[:]
    shuffler.shuffle(shuffled)
    assert [node.url for node in by_prefix(shuffled, key, random.Random())] == [node.url for node in order]


@given(st.integers(2, 12), st.binary(min_size=1, max_size=64), st.data())
def test_a_node_that_goes_moves_its_own_requests_only(size, key, data):
    nodes = fleet(size)
    order = by_prefix(nodes, key, random.Random())
    gone = data.draw(st.sampled_from(nodes))
    assert by_prefix([node for node in nodes if node is not gone], key, random.Random()) == [
        node for node in order if node is not gone]


@pytest.mark.parametrize('speeds', [[None] * 4, [1.0, 1.0, 2.0, 4.0]])
def test_keys_spread_in_proportion_to_speed(speeds):
    nodes = fleet(4, speeds)
    firsts = Counter(by_prefix(nodes, key, random.Random())[0].url for key in KEYS)
    total = sum(speed or 1.0 for speed in speeds)
    for node in nodes:
        assert abs(firsts[node.url] / len(KEYS) - (node.speed or 1.0) / total) < 0.03


@given(st.integers(1, 8), st.lists(st.integers(0, 5), min_size=1, max_size=200), st.booleans())
def test_no_node_has_more_than_its_bound(size, keys, weighted):
    """However unevenly the keys come; and below the slack, a key never leaves its node."""
    nodes = fleet(size, [float(i + 1) for i in range(size)] if weighted else None)
    total = sum(node.speed or 1.0 for node in nodes)
    for count, key in enumerate(keys):
        home = by_prefix(fleet(size, [node.speed for node in nodes]), b'%d' % key, random.Random())[0].url
        node = by_prefix(nodes, b'%d' % key, random.Random())[0]
        bound = max(SLACK, math.ceil(OVERLOAD * (count + 1) * (node.speed or 1.0) / total))
        assert node.unfinished < bound
        at_home = next(other for other in nodes if other.url == home)
        assert node is at_home or at_home.unfinished >= SLACK
        node.unfinished += 1


def test_without_a_prompt_the_quietest_node_is_first():
    nodes = fleet(3)
    nodes[0].unfinished, nodes[1].unfinished = 2, 1
    assert by_prefix(nodes, b'', random.Random()) == nodes[::-1]
