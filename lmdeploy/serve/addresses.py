"""What clients may do by the address from which they come: connections at a time, wrong keys a minute."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from lmdeploy.serve.admission import Bucket
from lmdeploy.serve.errors import HttpError

MAX_ADDRESSES = 4096  # that are remembered
IPV6_PREFIX = 64  # what one customer has of that space


def network(address: str) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 network of the size that one customer gets."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket has none
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False))


class FailedKeys:
    """Counts wrong keys by address. It is asked only when a key was wrong: a good one is never held up.

    Args:
        per_minute: so many are answered with 401, and as many at once; 0: all.
        clock: monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def note(self, address: str) -> None:
        """A wrong key came from ``address``.

        Raises:
            HttpError: LMD-533, too many did.
        """
        if not self._per_minute:
            return
        name, now = network(address), self._clock()
        bucket = self._buckets.pop(name, None) or Bucket(self._per_minute, float(self._per_minute), now)
        self._buckets[name] = bucket
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        bucket.refill(now)
        wait = bucket.wait(1)
        if wait:
            raise HttpError('LMD-533', most=self._per_minute, retry_after=max(1.0, wait))
        bucket.level -= 1


class Crowd:
    """Counts open connections, in all and by address.

    Args:
        most: in all.
        each: of one address; 0: no limit but ``most``.
    """

    def __init__(self, most: int, each: int) -> None:
        self._most, self._each = most, each
        self._open: Counter[str] = Counter()
        self.total = 0

    def enter(self, address: str) -> HttpError | None:
        """Count a new connection, unless it is one too many: then, why (LMD-531, LMD-532)."""
        name = network(address)
        if self.total >= self._most:
            return HttpError('LMD-531', most=self._most, retry_after=1)
        if self._each and self._open[name] >= self._each:
            return HttpError('LMD-532', most=self._each, retry_after=1)
        self.total += 1
        self._open[name] += 1
        return None

    def leave(self, address: str) -> None:
        """A connection that was counted is closed."""
        name = network(address)
        self.total -= 1
        self._open[name] -= 1
        if not self._open[name]:
            del self._open[name]
