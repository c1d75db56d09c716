"""100,000 turns of random arrivals, aborts and preemptions: answers as from a plain loop, no leak, no starvation."""

from __future__ import annotations

from lmdeploy.engine.simulate import simulate


def test_a_hundred_thousand_turns():
    report = simulate(range(10_000, 10_345), 250, check_every=5)
    assert report.turns >= 100_000
    assert report.preemptions > 1000 and report.hit_tokens > 10_000
    assert min(report.finishes[reason] for reason in ('stop', 'length', 'abort', 'error')) > 100
