"""WaitingQueue: priorities, first come first served, and fair shares between tenants."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.engine.request import Request
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.engine.waiting import WaitingQueue


def request(seq, tenant='', priority=0, length=1, preempted=False):
    made = Request(str(seq), seq, [1] * length, length, SamplingParams(), 1000, tenant=tenant, priority=priority)
    made.preempted = preempted
    return made


def admit_all(queue):
    order = []
    while (head := queue.head()) is not None:
        assert queue.head() is head, 'the head changes by itself'
        queue.admit(head)
        order.append(head)
    return order


WAITING = st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 2), st.integers(1, 50), st.booleans()), max_size=30)


@given(waiting=WAITING, quantum=st.integers(1, 100), dropped=st.sets(st.integers(0, 29)))
def test_everybody_is_admitted_once_in_order(waiting, quantum, dropped):
    queue = WaitingQueue(quantum)
    requests = [request(seq, *fields) for seq, fields in enumerate(waiting)]
    for one in reversed(requests):  # the order of pushing does not matter, that of arrival does
        queue.push(one)
    for one in requests:
        if one.seq in dropped:
            queue.remove(one)
    left = [one for one in requests if one.seq not in dropped]
    assert len(queue) == len(left) and Counter(queue) == Counter(left)
    order = admit_all(queue)
    assert Counter(order) == Counter(left) and len(queue) == 0
    assert [one.priority for one in order] == sorted((one.priority for one in order), reverse=True)
    for priority in range(3):
        level = [one for one in order if one.priority == priority]
        returning = [one.preempted for one in level]
        assert returning == sorted(returning, reverse=True), 'a new request goes before a preempted one'
        for tenant in 'abc':
            new = [one.seq for one in level if one.tenant == tenant and not one.preempted]
            assert new == sorted(new)
        assert [one.seq for one in level if one.preempted] == sorted(one.seq for one in level if one.preempted)


def test_a_tenant_with_many_requests_does_not_hold_up_another():
    queue = WaitingQueue(quantum=100)
    for seq in range(100):
        queue.push(request(seq, 'many', length=50))
    for seq in range(100, 105):
        queue.push(request(seq, 'few', length=50))
    order = [one.tenant for one in admit_all(queue)]
    assert order[:20].count('few') == 5


def test_short_prompts_do_not_make_a_turn_long():
    queue = WaitingQueue()
    for seq in range(100):
        queue.push(request(seq, 'many', length=20))
    queue.push(request(100, 'few', length=20))
    assert [one.tenant for one in admit_all(queue)].index('few') <= 4


def test_shares_are_in_tokens_not_in_requests():
    queue = WaitingQueue(quantum=100)
    for seq in range(400):
        queue.push(request(seq, 'long' if seq % 2 else 'short', length=100 if seq % 2 else 10))
    tokens = Counter()
    while sum(tokens.values()) < 4000:
        head = queue.head()
        queue.admit(head)
        tokens[head.tenant] += head.prompt_len
    assert abs(tokens['long'] - tokens['short']) <= 200


def test_a_large_request_is_not_overtaken_for_ever():
    queue = WaitingQueue(quantum=10)
    queue.push(request(0, 'large', length=500))
    order = []
    for seq in range(1, 400):
        queue.push(request(seq, 'small', length=10))
        head = queue.head()
        queue.admit(head)
        order.append(head.tenant)
    assert 'large' in order
