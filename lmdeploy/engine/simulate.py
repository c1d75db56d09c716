"""A deterministic simulation of the engine: everything follows from one seed.

Random arrivals, aborts, groups, tenants, priorities, salts, grammars, pictures, drafts and poisoned sequences meet a
random capacity. After every turn all invariants are asserted; every answer must equal what the request gives alone,
nobody may starve, and in the end nothing may be left. A failure names the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lmdeploy.config.vision import Layout
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor, GuessingDrafter, next_token, score, with_pictures
from lmdeploy.engine.intake import longest
from lmdeploy.engine.plan import PictureRoom
from lmdeploy.engine.request import Drafter, EngineInput, ImageSpan, TokenDelta
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.base import Capacity

VOCAB = 64
STOPS = (3, 40)
PATIENCE = 5  # turns in which the first request in rank must get on, once it holds a slot
PLACEHOLDER = 0  # the token that stands for a picture's


class EveryOther:
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
    params, tokens = given.params, with_pictures(given.tokens, given.images).tolist()
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


def draw_pictures(rng: random.Random, prompt: list[int]) -> tuple[list[int], tuple[ImageSpan, ...]]:
    """The prompt with pictures in the place of some of its tokens. There are few different ones, and of one size
    several, so that they come again and are mixed up if they can be."""
    prompt, at = list(prompt), 0
    spans: list[ImageSpan] = []
    while True:
        at += rng.randint(0, 6)
        which = rng.randrange(6)
        tiles, each = 1 + which % 3, 1 + which % 2
        end = at + tiles * each
        if end > len(prompt):
            return prompt, tuple(spans)
        pixels = np.full((tiles, 3, 1, 1), which, np.uint8)
        pixels[:, 0, 0, 0] = range(tiles)
        layout = Layout((1, 1), (1, tiles * each), tiles, tiles * each, 2 * tiles)
        spans.append(ImageSpan(at, end, bytes([which]), layout, pixels))
        prompt[at:end] = [PLACEHOLDER] * (end - at)
        at = end


class CheckedEngine:
    """An engine on a fake device that is asked, after every turn, for everything that it promises.

    Args:
        capacity: of the device.
        depth: launched, unretired steps at most.
        prefix_caching: keep and find the blocks of earlier requests.
        delayed: the fake device computes as late as it may.
        drafter: proposes draft tokens.
        check_every: turns between two checks of the invariants.
    """

    def __init__(self, capacity: Capacity, *, depth: int = 1, prefix_caching: bool = False, delayed: bool = False,
                 drafter: Drafter | None = None, check_every: int = 1) -> None:
        self.capacity = capacity
        self.executor = FakeExecutor(capacity, poisoned=poisoned, delayed=delayed)
        self.core = EngineCore(self.executor, capacity, depth=depth, prefix_caching=prefix_caching, drafter=drafter,
                               debug=True)
        self.check_every = check_every
        self.answers: dict[str, Answer] = {}  # unfinished
        self.finishes: Counter[str] = Counter()
        self.turns = 0
        self._patience: tuple[str, int, int] = ('', 0, 0)  # first in rank, what it had settled, since which turn
        self._admitted: dict[tuple[str, int], int] = {}
        self._running: set[int] = set()
        self._preemptions = 0
        self._scopes: dict[tuple[bytes, str], dict[str, list[int]]] = {}  # what requests of equal salt and tenant say

    def submit(self, given: EngineInput) -> None:
        """Hand a request in."""
        expected = alone(given, longest(self.core.scheduler.capacity))
        self.answers[given.id] = Answer(given, expected)
        said = with_pictures(given.tokens, given.images).tolist() + expected.tokens
        self._scopes.setdefault((given.salt, given.tenant), {})[given.id] = said
        self.core.submit(given)

    def abort(self, request_id: str) -> None:
        """End a request early."""
        self.core.abort(request_id)

    def turn(self) -> None:
        """One step of the engine, and all that must hold after it."""
        self.turns += 1
        scheduler = self.core.scheduler
        steps, flying = scheduler.counters.steps, len(self.core.launched)
        deltas = self.core.step()
        assert self.core.dead is None, f'the engine died: {self.core.dead}'
        for delta in deltas:
            self._take(delta)
        if scheduler.requests and not deltas:
            assert flying or scheduler.counters.steps > steps, 'requests wait and nothing runs'
        self._admissions()
        self._starving()
        if self.turns % self.check_every == 0:
            self.core.check()
            self._contents()

    def drain(self) -> None:
        """Serve those who are left; then everything must be as in the beginning."""
        left = 50 + 4 * sum(len(answer.given.tokens) + answer.given.params.max_new_tokens + 2
                            for answer in self.answers.values())
        while not self.core.idle:
            assert left, 'requests that never end'
            left -= 1
            self.turn()
        self.core.check()
        assert not self.answers, 'a request was forgotten'
        assert self.core.stats().used_blocks == 0

    def _take(self, delta: TokenDelta) -> None:
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
            assert reason == expected.reason, f'{delta.finish}, not {expected.reason}'
            assert answer.tokens == expected.tokens, 'tokens are missing'
        if reason in ('stop', 'length'):
            assert answer.logits == expected.logits, 'rows of logits are missing'
        if reason == 'error':
            assert delta.finish.error is not None and delta.finish.error.code == 'LMD-334', delta.finish
        self._hit(answer, delta.cached_tokens)

    def _hit(self, answer: Answer, cached: int) -> None:
        """What was found in the prefix cache was said by another request of the same salt and tenant."""
        given = answer.given
        said = self._scopes[given.salt, given.tenant]
        own = said[given.id]
        assert not cached or any(other != given.id and tokens[:cached] == own[:cached]
                                 for other, tokens in said.items()), 'blocks cross a salt or a tenant'

    def _admissions(self) -> None:
        """Within a tenant and a priority, requests outside groups are admitted as they arrived; nobody is admitted in
        a turn that preempts."""
        scheduler = self.core.scheduler
        running = {request.seq: request for request in scheduler.running}
        new = running.keys() - self._running
        if scheduler.counters.preemptions > self._preemptions:
            self._preemptions = scheduler.counters.preemptions
            assert not new, 'admitted in a turn that preempted'
        for seq in sorted(new):
            request = running[seq]
            if request.group is None and not request.preempted:
                key = (request.tenant, request.priority)
                assert self._admitted.get(key, 0) < seq, 'admitted out of order'
                self._admitted[key] = seq
        self._running = set(running)

    def _starving(self) -> None:
        """The first running request in rank gets on."""
        running = self.core.scheduler.running
        if not running:
            return
        first = running[0]
        request_id, settled, since = self._patience
        done = first.settled + self.executor.encoded_tiles
        if first.id != request_id or done != settled:
            self._patience = (first.id, done, self.turns)
            return
        assert self.turns - since < PATIENCE, 'the first request starves'

    def _contents(self) -> None:
        """The cache holds what the prefix index says, and nothing that bad logits came from."""
        pool, cache = self.core.scheduler.pool, self.executor.cache
        for block, tokens in pool.indexed():
            assert tuple(cache[block].tolist()) == tokens, 'a block in the index has other content'
            assert block not in self.executor.tainted, 'a block that gave bad logits can be found'


class Simulation:
    """A checked engine of random size and its random customers.

    Args:
        seed: decides everything.
        check_every: turns between two checks of the invariants.
    """

    def __init__(self, seed: int, *, check_every: int = 1) -> None:
        rng = self.random = random.Random(seed)
        size, blocks = rng.choice([2, 4, 8, 16]), rng.randint(4, 30)
        capacity = Capacity(
            num_blocks=blocks, block_size=size, max_batch_size=rng.randint(1, 8), max_step_tokens=rng.randint(3, 40),
            session_len=min(blocks * size + rng.randint(-2, 5), 120), vocab_size=VOCAB,
            pictures=PictureRoom(rng.randint(8, 24), rng.choice([1, 3, 10]), rng.choice([2, 8, 40]),
                                 rng.choice([None, None, 1])) if rng.random() < 0.5 else None)
        drafter = GuessingDrafter(VOCAB, accuracy=rng.random(), seed=seed) if rng.random() < 0.25 else None
        self.engine = CheckedEngine(capacity, depth=rng.choice([1, 2, 2]), prefix_caching=rng.random() < 0.6,
                                    delayed=rng.random() < 0.5, drafter=drafter, check_every=check_every)
        self.load = rng.choice([2, 6, 20])  # unfinished requests that customers keep up
        self.abort_rate = rng.choice([0.0, 0.02, 0.1])
        self._ids = 0
        self._prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 3 * size + 1))] for _ in range(3)]

    def run(self, turns: int) -> None:
        """Live through ``turns`` turns with customers, then until nobody is left."""
        for _ in range(turns):
            self.arrive()
            self.engine.turn()
        self.engine.drain()

    def arrive(self) -> None:
        """New customers, and some who leave."""
        rng, waiting = self.random, self.engine.answers
        while len(waiting) < self.load and rng.random() < 0.4:
            self.submit()
        if waiting and rng.random() < self.abort_rate:
            self.engine.abort(rng.choice(list(waiting)))

    def submit(self) -> None:
        """One request, or a group that shares its prompt."""
        rng, capacity = self.random, self.engine.capacity
        longest = min(capacity.session_len - 1, capacity.num_blocks * capacity.block_size)
        prompt = rng.choice(self._prefixes) if rng.random() < 0.6 else []
        prompt = (prompt + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 20]))])[:longest]
        params = SamplingParams(max_new_tokens=rng.choice([0, 1, 3, 10, 30]), stop_ids=rng.choice([(), STOPS]),
                                output_logits=rng.choice([None] * 6 + ['all', 'generation']),
                                logits_processors=(max,) if rng.random() < 0.05 else ())
        count = rng.choice([1, 1, 1, 2, 4])
        salt, tenant = rng.choice([b'', b'', b'x']), rng.choice(['', 'a', 'b'])
        priority, grammar = rng.choice([0, 0, 0, 1]), rng.random() < 0.1
        images: tuple[ImageSpan, ...] = ()
        if capacity.pictures is not None and rng.random() < 0.5:
            prompt, images = draw_pictures(rng, prompt)
        self._ids += 1
        for i in range(count):
            self.engine.submit(EngineInput(
                f'{self._ids}.{i}', prompt, params, salt=salt, tenant=tenant, priority=priority, images=images,
                share=str(self._ids) if count > 1 else None, grammar=EveryOther() if grammar else None))


@dataclass(slots=True)
class Report:
    """What many simulations did."""

    turns: int = 0
    finishes: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    hit_tokens: int = 0
    computed_tokens: int = 0

    def add(self, other: Report) -> None:
        """Count ``other`` in."""
        self.turns += other.turns
        self.finishes += other.finishes
        self.preemptions += other.preemptions
        self.hit_tokens += other.hit_tokens
        self.computed_tokens += other.computed_tokens


def simulate(seeds: Iterable[int], turns: int, *, check_every: int = 1) -> Report:
    """Run one simulation per seed.

    Raises:
        AssertionError: a promise was broken; the text names the seed.
    """
    report = Report()
    for seed in seeds:
        simulation = Simulation(seed, check_every=check_every)
        try:
            simulation.run(turns)
        except AssertionError as error:
            raise AssertionError(f'seed {seed}, turn {simulation.engine.turns}: {error}') from error
        engine, stats = simulation.engine, simulation.engine.core.stats()
        report.add(Report(engine.turns, engine.finishes, stats.preemptions, stats.prefix_hit_tokens,
                          stats.computed_tokens))
    return report
