"""When a process hangs, when it is started again, and who is suspected: the rules alone, on a clock of their own."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from lmdeploy.engine import supervisor
from lmdeploy.engine.ledger import Ledger
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.engine.supervisor import CrashLog, Limits, StepWatch
from lmdeploy.engine.suspects import MOST_SUSPECTS, Suspects, digest
from lmdeploy.engine.wire import STATS
from lmdeploy.errors import RequestError


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(supervisor, 'time', clock)
    return clock


def ask(*tokens, **params):
    return EngineInput('a', list(tokens), SamplingParams(**params))


def warm(watch, seconds):
    watch.work(True)
    for step in range(1, 101):
        watch.progress(step, seconds)


@pytest.mark.parametrize('patient, step, limit', [(False, 0.01, 30), (False, 5.0, 100), (True, 0.01, 300)])
def test_a_hang_is_long_for_the_device_and_its_steps(clock, patient, step, limit):
    watch = StepWatch(Limits(), patient=patient)
    warm(watch, step)
    clock.now += limit - 1
    assert not watch.hangs and watch.age == limit - 1
    watch.progress(100, step)  # a message without a new step
    clock.now += 2
    assert watch.hangs
    watch.progress(101, step)
    assert not watch.hangs and watch.age == 0


def test_first_steps_may_compile(clock):
    watch = StepWatch(Limits(), patient=False)
    watch.work(True)
    clock.now += 299
    assert not watch.hangs
    clock.now += 2
    assert watch.hangs


def test_without_work_nothing_hangs(clock):
    watch = StepWatch(Limits(), patient=False)
    warm(watch, 0.01)
    watch.work(False)
    clock.now += 1000
    assert not watch.hangs and watch.age == 0
    watch.work(True)
    clock.now += 20
    watch.work(True)  # one more request does not reset the clock
    clock.now += 11
    assert watch.hangs
    watch.excuse()
    assert not watch.hangs


def test_delays_double_up_to_the_last(clock):
    log = CrashLog(replace(Limits(), crashes=100, window=1e6))
    assert [log.crashed() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]


def test_three_crashes_within_a_minute_are_the_end(clock):
    log = CrashLog(Limits())
    assert log.crashed() == 1
    clock.now += 40
    assert log.crashed() == 2
    clock.now += 19
    assert log.crashed() is None


def test_old_crashes_are_forgotten(clock):
    log = CrashLog(Limits())
    for _ in range(10):
        assert log.crashed() is not None
        clock.now += 31
    clock.now += 61
    assert log.crashed() == 1


def test_a_digest_is_of_what_is_asked():
    assert digest(ask(1, 2)) == digest(replace(ask(1, 2, seed=5), id='b', salt=b'x', tenant='t'))
    others = [ask(1, 3), ask(1, 2, top_k=3), replace(ask(1, 2), adapter='x')]
    assert len({digest(request) for request in [ask(1, 2), *others]}) == 4


def test_suspects_are_tried_one_by_one_and_others_do_not_wait():
    async def main():
        suspects = Suspects()
        assert await suspects.admit(ask(1)) is None
        suspects.accuse(ask(1), 10)
        suspects.accuse(ask(2), 0)
        assert await suspects.admit(ask(3)) is None
        trial = await suspects.admit(ask(1))
        second = asyncio.ensure_future(suspects.admit(ask(2)))
        trial.saw(10, ended=False)  # where it was at the crash: the next token may be fatal again
        await asyncio.sleep(0.01)
        assert not second.done()
        trial.saw(11, ended=False)
        other = await asyncio.wait_for(second, 1)
        trial.close()  # at the end of its stream; the turn is the other's by now
        suspects.accuse(ask(2), 0)
        waiting = asyncio.ensure_future(suspects.admit(ask(2)))
        await asyncio.sleep(0)
        other.close()
        with pytest.raises(RequestError, match='LMD-346'):
            await waiting
        assert await suspects.admit(ask(1)) is None, 'acquitted'
        with pytest.raises(RequestError, match='LMD-346'):
            await suspects.admit(ask(2))

    asyncio.run(main())


def test_a_good_end_acquits():
    async def main():
        suspects = Suspects()
        suspects.accuse(ask(1), 10)
        (await suspects.admit(ask(1))).saw(3, ended=True)
        assert await suspects.admit(ask(1)) is None

    asyncio.run(main())


def test_suspects_are_not_remembered_without_end():
    async def main():
        suspects = Suspects()
        for i in range(MOST_SUSPECTS + 1):
            suspects.accuse(ask(i), 0)
        assert await suspects.admit(ask(0)) is None
        assert await suspects.admit(ask(1)) is not None

    asyncio.run(main())


@pytest.mark.parametrize('cancelled', [False, True])
def test_counters_go_on_over_crashes(cancelled):
    def numbers(**given):
        return [given.get(name, 0) for name in STATS]

    ledger = Ledger()
    ledger.update(numbers(accepted=10, finished=6, cancelled=1, in_flight=3, running=2, steps=50, used_blocks=9))
    ledger.crashed(5, cancelled=cancelled)  # two of them had not been taken in
    stats = ledger.stats()
    assert stats.accepted == 12 and stats.finished == 6 and stats.in_flight == stats.used_blocks == stats.running == 0
    assert (stats.failed, stats.cancelled) == ((0, 6) if cancelled else (5, 1))
    ledger.update(numbers(accepted=1, in_flight=1, steps=2))
    assert ledger.steps == 2 and ledger.stats().steps == 52
    stats = ledger.stats()
    assert stats.accepted == stats.finished + stats.failed + stats.cancelled + stats.in_flight == 13
