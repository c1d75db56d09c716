"""A deterministic simulation of the engine: everything follows from one seed.

Random arrivals, aborts, groups, tenants, priorities, salts, grammars, drafts and poisoned sequences meet a random
capacity. After every turn all invariants are asserted; every answer must equal what the request gives alone, nobody may
starve, and in the end nothing may be left. A failure names the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor, GuessingDrafter, next_token, score
from lmdeploy.engine.metrics import EngineStats
from lmdeploy.engine.request import EngineInput, Request, TokenDelta
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.base import Capacity

VOCAB = 64
STOPS = (3, 40)
PATIENCE = 60  # turns in which the first request in rank must get on, once it holds a slot


class EveryOther(object):
    """A grammar that allows even and odd tokens in turn, beginning with even ones."""

    def __init__(self) -> None:
        self.accepted = 0

    def fill(self, mask: np.ndarray) -> None:
        """Bits of the tokens whose parity is the count's."""
        mask[:] = 0xAAAAAAAA if self.accepted % 2 else 0x55555555

    def accept(self, token: int) -> None:
        """Count, and see that the mask was obeyed."""
        assert token % 2 == self.accepted % 2, 'a token that the grammar does not allow'
        self.accepted += 1


def poisoned(sequence: np.ndarray) -> bool:
    """About one sequence in 300 gives logits that are not finite."""
    return score(sequence) % 300 == 7


@dataclass(slots=True)
class Expected:
    """What a request gives alone."""

    tokens: list[int]
    reason: str
    logits: list[int]


@dataclass(slots=True)
class Answer:
    """What a request gave so far."""

    given: EngineInput
    expected: Expected
    tokens: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    reason: str | None = None


def alone(given: EngineInput, session_len: int) -> Expected:
    """The answer of a request by the plainest loop."""
    params, tokens = given.params, list(given.tokens)
    grammar = EveryOther() if given.grammar is not None else None
    limit = min(len(tokens) + params.max_new_tokens, session_len)
    reason, mask = 'length', None
    while len(tokens) < limit:
        sequence = np.array(tokens, np.int32)
        if poisoned(sequence):
            reason = 'error'
            break
        if grammar is not None:
            mask = np.zeros(VOCAB // 32, np.uint32)
            grammar.fill(mask)
        token = next_token(sequence, VOCAB, mask)
        if token in params.stop_ids:
            reason = 'stop'
            break
        tokens.append(token)
        if grammar is not None:
            grammar.accept(token)
    first, last = 0, 0
    if params.output_logits == 'all':
        last = max(len(given.tokens), len(tokens) - 1)
    elif params.output_logits == 'generation':
        first, last = len(given.tokens) - 1, len(tokens) - 1
    logits = [score(np.array(tokens[:end + 1], np.int32)) for end in range(first, last)]
    return Expected(tokens[len(given.tokens):], reason, logits)


class Simulation:
    """One engine and its customers.

    Args:
        seed: decides everything.
        check_every: turns between two checks of the invariants.
    """

    def __init__(self, seed: int, *, check_every: int = 1) -> None:
        self.random = random.Random(seed)
        rng = self.random
        size = rng.choice([2, 4, 8])
        blocks = rng.randint(4, 30)
        self.capacity = Capacity(
            num_blocks=blocks, block_size=size, max_batch_size=rng.randint(1, 8), max_step_tokens=rng.randint(3, 40),
            session_len=min(blocks * size + rng.randint(-2, 5), 120), vocab_size=VOCAB)
        drafter = GuessingDrafter(VOCAB, accuracy=rng.random(), seed=seed) if rng.random() < 0.25 else None
        self.prefix_caching = rng.random() < 0.6
        self.executor = FakeExecutor(self.capacity, poisoned=poisoned, delayed=rng.random() < 0.5)
        self.core = EngineCore(self.executor, self.capacity, depth=rng.choice([1, 2, 2]),
                               prefix_caching=self.prefix_caching, drafter=drafter, debug=True)
        self.check_every = check_every
        self.load = rng.choice([2, 6, 20])  # unfinished requests that customers keep up
        self.abort_rate = rng.choice([0.0, 0.02, 0.1])
        self.answers: dict[str, Answer] = {}  # unfinished
        self.finishes: Counter[str] = Counter()
        self.turns = 0
        self._ids = 0
        self._patience: tuple[str, int, int] = ('', 0, 0)  # first in rank, what it had computed, since which turn
        self._admitted: dict[tuple[str, int], int] = {}
        self._running: set[int] = set()
        self._prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 3 * size + 1))] for _ in range(3)]

    def run(self, turns: int) -> None:
        """Live through ``turns`` turns with customers, then until nobody is left."""
        for _ in range(turns):
            self.arrive()
            self.turn()
        self.drain()

    def drain(self) -> None:
        """Serve those who are left; then everything must be as in the beginning."""
        left = 50 + 4 * sum(len(answer.given.tokens) + answer.given.params.max_new_tokens + 2 for answer in self.answers.values())
        while not self.core.idle:
            assert left, 'requests that never end'
            left -= 1
            self.turn()
        self.core.check()
        assert not self.answers, 'a request was forgotten'
        assert self.core.stats().used_blocks == 0

    def arrive(self) -> None:
        """New customers, and some who leave."""
        rng = self.random
        while len(self.answers) < self.load and rng.random() < 0.4:
            self.submit()
        if self.answers and rng.random() < self.abort_rate:
            self.core.abort(rng.choice(list(self.answers)))

    def submit(self) -> None:
        """One request, or a group that shares its prompt."""
        rng = self.random
        longest = min(self.capacity.session_len - 1, self.capacity.num_blocks * self.capacity.block_size)
        prompt = rng.choice(self._prefixes) if rng.random() < 0.6 else []
        prompt = (prompt + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 20]))])[:longest]
        params = SamplingParams(max_new_tokens=rng.choice([0, 1, 3, 10, 30]), stop_ids=rng.choice([(), STOPS]),
                                output_logits=rng.choice([None] * 6 + ['all', 'generation']),
                                logits_processors=(max,) if rng.random() < 0.05 else ())
        count = rng.choice([1, 1, 1, 2, 4])
        salt, tenant = rng.choice([b'', b'', b'x']), rng.choice(['', 'a', 'b'])
        priority, grammar = rng.choice([0, 0, 0, 1]), rng.random() < 0.1
        self._ids += 1
        for i in range(count):
            given = EngineInput(f'{self._ids}.{i}', prompt, params, salt=salt, tenant=tenant, priority=priority,
                                share=str(self._ids) if count > 1 else None, grammar=EveryOther() if grammar else None)
            self.answers[given.id] = Answer(given, alone(given, self.core.scheduler.session_len))
            self.core.submit(given)

    def turn(self) -> None:
        """One step of the engine, and all that must hold after it."""
        self.turns += 1
        before = self.core.scheduler.counters.steps + len(self.core.launched)
        flying = len(self.core.launched)
        deltas = self.core.step()
        assert self.core.dead is None, f'the engine died: {self.core.dead}'
        for delta in deltas:
            self.take(delta)
        scheduler = self.core.scheduler
        if scheduler.requests and not deltas:
            launched = scheduler.counters.steps + len(self.core.launched) - before
            assert launched or flying, 'requests wait and nothing runs'
        self._fifo()
        self._starving()
        if self.turns % self.check_every == 0:
            self.core.check()
            self._contents()

    def take(self, delta: TokenDelta) -> None:
        """Compare what came with what the request gives alone."""
        answer = self.answers.get(delta.id)
        assert answer is not None, 'a delta after the last one'
        answer.tokens += delta.tokens
        if delta.logits is not None:
            answer.logits += delta.logits[:, 0].astype(np.int64).tolist()
        expected = answer.expected
        assert answer.tokens == expected.tokens[:len(answer.tokens)], 'wrong tokens'
        assert answer.logits == expected.logits[:len(answer.logits)], 'wrong rows of logits'
        if delta.finish is None:
            return
        del self.answers[delta.id]
        reason = delta.finish.reason
        self.finishes[reason] += 1
        if reason != 'abort':
            assert (reason, answer.tokens) == (expected.reason, expected.tokens), f'{delta.finish}, not {expected.reason}'
        if reason in ('stop', 'length'):
            assert answer.logits == expected.logits, 'rows of logits are missing'
        if reason == 'error':
            assert delta.finish.error is not None and delta.finish.error.code == 'LMD-334', delta.finish

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self.core.stats()

    def _fifo(self) -> None:
        """Within a tenant and a priority, requests outside groups are admitted in the order of their arrival."""
        running = {request.seq: request for request in self.core.scheduler.running}
        for seq in sorted(running.keys() - self._running):
            request = running[seq]
            if request.group is None and not request.preempted:
                key = (request.tenant, request.priority)
                assert self._admitted.get(key, 0) < seq, 'admitted out of order'
                self._admitted[key] = seq
        self._running = set(running)

    def _starving(self) -> None:
        """The first running request in rank gets on."""
        running: list[Request] = self.core.scheduler.running
        if not running:
            return
        first = running[0]
        request_id, computed, since = self._patience
        if first.id != request_id or first.computed > computed:
            self._patience = (first.id, first.computed, self.turns)
            return
        assert self.turns - since < PATIENCE, 'the first request starves'

    def _contents(self) -> None:
        """The cache holds what the prefix index says."""
        for block, tokens in (self.core.scheduler.pool._tokens or {}).items():
            assert tuple(self.executor.cache[block].tolist()) == tokens, 'a block in the index has other content'
