"""BlockPool against a model of dictionaries, and the laws of block keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmdeploy.config.vision import Layout
from lmdeploy.engine.block_pool import BlockPool, block_key, root_key
from lmdeploy.engine.request import ImageSpan, Request
from lmdeploy.engine.sampling import SamplingParams


class PoolMachine(RuleBasedStateMachine):
    """Tables come, share, publish and go; the model is who holds what, and what was published and not yet evicted."""

    @initialize(blocks=st.integers(1, 12))
    def start(self, blocks):
        self.pool = BlockPool(blocks, debug=True)
        self.tables: list[list[int]] = []
        self.content: dict[int, int] = {}  # block -> what it was published as
        self.idle: list[int] = []  # published and unused, least recently used first

    def used(self):
        return {block for table in self.tables for block in table}

    def forget(self, block):
        self.content.pop(block, None)
        if block in self.idle:
            self.idle.remove(block)

    @rule(count=st.integers(1, 4))
    def allocate(self, count):
        if count > self.pool.available:
            assert count > self.pool.num_blocks - len(self.used())
            return
        free = self.pool.num_blocks - len(self.used()) - len(self.idle)
        evicted = self.idle[:max(0, count - free)]
        before = self.used()
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count and not before & set(blocks) and 0 not in blocks
        assert set(evicted) <= set(blocks), 'a published block was evicted although others were free or used earlier'
        for block in evicted:
            self.forget(block)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), content=st.integers(0, 5))
    def publish(self, data, content):
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        if block in self.content:
            return
        known = content in self.content.values()
        assert self.pool.publish(block, bytes([content]), [content]) is not known
        if not known:
            self.content[block] = content

    @rule(contents=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    def match(self, contents):
        held = {content: block for block, content in self.content.items()}
        expected = []
        for content in contents:
            if content not in held:
                break
            expected.append(held[content])
        assert self.pool.match([bytes([c]) for c in contents], contents, 1) == expected
        for block in expected:
            if block in self.idle:
                self.idle.remove(block)
        if expected:
            self.tables.append(expected)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            if block in self.content and block not in self.used():
                self.idle.append(block)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def withdraw(self, data):
        block = data.draw(st.sampled_from(sorted(self.content)))
        self.pool.withdraw(block)
        self.forget(block)

    @invariant()
    def agrees(self):
        if not hasattr(self, 'pool'):
            return
        self.pool.check(self.tables)
        assert self.pool.used == len(self.used())
        assert self.pool.cached == len(self.idle)
        assert self.pool.available == self.pool.num_blocks - len(self.used())
        assert dict(self.pool.indexed()) == {block: (content,) for block, content in self.content.items()}


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_block_cannot_be_released_twice():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(AssertionError, match='not in use'):
        pool.release(blocks)


def test_later_blocks_of_a_table_are_evicted_first():
    pool = BlockPool(4)
    table = pool.allocate(4)
    for block in table:
        pool.publish(block, bytes([block]))
    pool.release(table)
    assert pool.allocate(1) == table[-1:]
    assert pool.match([bytes([block]) for block in table]) == table[:3]


def test_other_tokens_under_a_known_key_are_noticed_in_debug_mode():
    pool = BlockPool(2, debug=True)
    [block] = pool.allocate(1)
    pool.publish(block, b'key', [1, 2])
    with pytest.raises(AssertionError, match='other tokens'):
        pool.match([b'key'], [1, 3], 2)


def hashes(tokens, size=4, images=(), root=None):
    request = Request('r', 1, tokens, len(tokens), SamplingParams(), 100, images=images, root=root or root_key(b''))
    request.extend_hashes(len(tokens) // size, size)
    return request.hashes


@given(first=st.lists(st.integers(0, 3), max_size=24), second=st.lists(st.integers(0, 3), max_size=24))
def test_keys_are_equal_exactly_where_all_tokens_so_far_are(first, second):
    for i, (a, b) in enumerate(zip(hashes(first), hashes(second))):
        assert (a == b) == (first[:4 * i + 4] == second[:4 * i + 4])


@given(cuts=st.lists(st.integers(0, 8), max_size=5))
def test_keys_do_not_depend_on_when_tokens_became_known(cuts):
    tokens = list(range(32))
    request = Request('r', 1, tokens, 32, SamplingParams(), 100, root=root_key(b''))
    for blocks in [*cuts, 8]:
        request.extend_hashes(blocks, 4)
    assert request.hashes == hashes(tokens)


def test_roots_tell_apart_salt_tenant_and_adapter():
    roots = {root_key(*parts) for parts in [(b'', b'', b''), (b'a', b'', b''), (b'', b'a', b''), (b'', b'', b'a'),
                                           (b'a', b'b', b''), (b'ab', b'', b''), (b'', b'ab', b'')]}
    assert len(roots) == 7


def picture(start, end, digest):
    return ImageSpan(start, end, digest, Layout((1, 1), (1, end - start), 1, end - start, 1),
                     np.zeros((1, 3, 1, 1), np.uint8))


def test_images_are_part_of_the_key_from_their_first_block_on():
    tokens = [1] * 16
    plain = hashes(tokens)
    one = hashes(tokens, images=(picture(5, 9, b'one'),))
    two = hashes(tokens, images=(picture(5, 9, b'two'),))
    moved = hashes(tokens, images=(picture(6, 10, b'one'),))
    assert plain[0] == one[0] == two[0] == moved[0]
    for keys in zip(plain[1:], one[1:], two[1:], moved[1:]):
        assert len(set(keys)) == 4


def test_keys_need_the_secret(monkeypatch):
    before = block_key(b'parent', b'tokens')
    monkeypatch.setattr('lmdeploy.engine.block_pool._SECRET', b'another secret')
    assert block_key(b'parent', b'tokens') != before
