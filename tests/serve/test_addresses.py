"""Addresses: what counts as one client, and how many of them are remembered."""

from __future__ import annotations

import pytest

from lmdeploy.serve.addresses import MAX_ADDRESSES, Crowd, FailedKeys, network
from lmdeploy.serve.errors import HttpError


@pytest.mark.parametrize(('address', 'name'), [
    ('192.0.2.1', '192.0.2.1'), ('::ffff:192.0.2.1', '192.0.2.1'), ('2001:db8:1:2:3::4', '2001:db8:1:2::/64'),
    ('2001:db8:1:2:ffff::', '2001:db8:1:2::/64'), ('fe80::1%eth0', 'fe80::/64'), ('', ''),
    ('/run/socket', '/run/socket')])
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(address, name):
    assert network(address) == name


def test_wrong_keys_come_back_with_time_and_each_address_has_its_own():
    now = 0.0
    failed = FailedKeys(2, lambda: now)

    def refused(address: str) -> bool:
        try:
            failed.note(address)
        except HttpError as error:
            assert error.code == 'LMD-533' and 1 <= error.params['retry_after'] <= 30
            return True
        return False

    assert [refused('a') for _ in range(4)] == [False, False, True, True]
    assert not refused('b')
    now = 30.0
    assert [refused('a') for _ in range(2)] == [False, True]
    for i in range(3 * MAX_ADDRESSES):
        failed.note(f'10.0.{i >> 8}.{i & 255}')
    assert len(failed._buckets) == MAX_ADDRESSES
    for _ in range(100):
        FailedKeys(0).note('a')


def test_a_crowd_counts_all_and_each():
    crowd = Crowd(5, 3)
    codes = [error and error.code for error in map(crowd.enter, 'aaaabbbc')]
    assert codes == [None, None, None, 'LMD-532', None, None, 'LMD-531', 'LMD-531']
    crowd.leave('a')
    assert crowd.enter('c') is None and crowd.total == 5
    for name in 'aabbc':
        crowd.leave(name)
    assert crowd.total == 0 and [Crowd(5, 0).enter('a') for _ in range(5)] == [None] * 5
