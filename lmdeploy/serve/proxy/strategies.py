"""Which node gets a request: strategies that put the nodes of a model in an order. If one fails, the next is tried.

========================  ==============================================================================================
``random``                by chance, weighted by the declared speeds
``min_expected_latency``  fewest unfinished requests per speed
``min_observed_latency``  least mean latency of the last minute's answers
``prefix_affinity``       requests that begin alike go to the same node, as long as it is not overloaded
========================  ==============================================================================================

A node without a declared speed has the mean of the others (1 if none has one).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence

from lmdeploy.serve.proxy.nodes import Node

OVERLOAD = 1.25
SLACK = 8
Strategy = Callable[[Sequence[Node], bytes, random.Random], list[Node]]
"""``(nodes, affinity key or b'', chance) -> nodes, the best first``."""


def speeds(nodes: Sequence[Node]) -> list[float]:
    """The speed of each node."""
    known = [node.speed for node in nodes if node.speed is not None]
    mean = sum(known) / len(known) if known else 1.0
    return [mean if node.speed is None else node.speed for node in nodes]


def by_chance(nodes: Sequence[Node], key: bytes, chance: random.Random) -> list[Node]:
    """Weighted sampling without replacement: Efraimidis and Spirakis, 2006, with exponential variates."""
    times = [chance.expovariate(speed) for speed in speeds(nodes)]
    return [node for _, _, node in sorted(zip(times, range(len(nodes)), nodes))]


def by_expected_latency(nodes: Sequence[Node], key: bytes, chance: random.Random) -> list[Node]:
    """Fewest unfinished requests per speed first; chance decides between equals."""
    loads = [node.unfinished / speed for node, speed in zip(nodes, speeds(nodes))]
    return _sorted(nodes, [(load, chance.random()) for load in loads])


def by_observed_latency(nodes: Sequence[Node], key: bytes, chance: random.Random) -> list[Node]:
    """Least latency first. A node without observations counts as the quickest; among equals the less busy one, so that
    a new node is tried and not flooded."""
    seen = [node.latency for node in nodes]
    least = min((value for value in seen if value is not None), default=0.0)
    return _sorted(nodes, [(least if value is None else value, node.unfinished / speed, chance.random())
                           for node, value, speed in zip(nodes, seen, speeds(nodes))])


def by_prefix(nodes: Sequence[Node], key: bytes, chance: random.Random) -> list[Node]:
    """Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018) over weighted rendezvous hashing
    (Thaler and Ravishankar, 1998).

    A node's place in the order of a key depends on no other node: one that comes or goes moves only its own requests.
    The first that has room is taken; a node has room below ``max(SLACK, OVERLOAD x its share of all unfinished)``.
    Without a key it is :func:`by_expected_latency`.
    """
    if not key:
        return by_expected_latency(nodes, key, chance)
    weights = speeds(nodes)
    order = _sorted(nodes, [-_rendezvous(key, node.url, weight) for node, weight in zip(nodes, weights)])
    share = OVERLOAD * (sum(node.unfinished for node in nodes) + 1) / sum(weights)
    room = {id(node): max(SLACK, math.ceil(share * weight)) for node, weight in zip(nodes, weights)}
    return sorted(order, key=lambda node: node.unfinished >= room[id(node)])  # stable: the order stays within both


def _rendezvous(key: bytes, url: str, weight: float) -> float:
    """The score of a node for a key; the greatest wins with a probability in proportion to its weight."""
    digest = hashlib.blake2b(url.encode(), key=key[:64], digest_size=8).digest()
    uniform = (int.from_bytes(digest, 'big') + 0.5) / 2.0**64
    return -weight / math.log(min(uniform, 1 - 2**-53))


def _sorted(nodes: Sequence[Node], ranks: Sequence[object]) -> list[Node]:
    return [nodes[i] for i in sorted(range(len(nodes)), key=lambda i: ranks[i])]  # type: ignore[arg-type, return-value]


STRATEGIES: dict[str, Strategy] = {
    'random': by_chance,
    'min_expected_latency': by_expected_latency,
    'min_observed_latency': by_observed_latency,
    'prefix_affinity': by_prefix,
}
