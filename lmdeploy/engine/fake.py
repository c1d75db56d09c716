"""FakeExecutor: a model whose next token is a hash of the sequence that it really reads.

Token ids are written into a cache through block tables and read back through them, as a real model does with keys and
values, and beside each id a checksum of all tokens up to it, since keys and values depend on what came before. In the
place of a picture's tokens stand numbers made of its pixels, once all its tiles were encoded. A block
that is stale, shared by mistake, or given away too early changes every token that follows; and since the hash is known,
any request's answer can be computed alone by :func:`continuation`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmdeploy.config.vision import Layout
from lmdeploy.engine.plan import DEAD_MASK, NON_FINITE, OK, OUTPUT_ALL, OUTPUT_NONE, PENDING, StepPlan, StepResult
from lmdeploy.engine.request import ImageSpan, Request
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.base import Capacity

EMPTY = -2  # what the cache holds where nothing was written


def score(sequence: np.ndarray) -> int:
    """A number that depends on every id of ``sequence [n] int32`` and on their order."""
    return zlib.crc32(sequence.tobytes())


def next_token(sequence: np.ndarray, vocab_size: int, mask: np.ndarray | None = None) -> int:
    """The token after ``sequence``: its score, moved up to the next token that ``mask`` allows (-1: none)."""
    token = score(sequence) % vocab_size
    if mask is None:
        return token
    for step in range(vocab_size):
        candidate = (token + step) % vocab_size
        if mask[candidate // 32] >> (candidate % 32) & 1:
            return candidate
    return -1


def embeddings(pixels: np.ndarray, tokens: int) -> np.ndarray:
    """``[tokens] int32``: what a picture's tokens are in a sequence."""
    start = zlib.crc32(pixels.tobytes())
    return np.array([zlib.crc32(i.to_bytes(4, 'little'), start) >> 1 for i in range(tokens)], np.int32)


def with_pictures(tokens: Sequence[int], images: Sequence[ImageSpan]) -> np.ndarray:
    """``[n] int32``: the sequence as the model reads it."""
    sequence = np.array(tokens, np.int32)
    for span in images:
        sequence[span.start:span.end] = embeddings(span.pixels, span.end - span.start)
    return sequence


def continuation(prompt: Sequence[int], params: SamplingParams, vocab_size: int,
                 session_len: int) -> tuple[list[int], str]:
    """What a request alone generates, by the plainest loop, and its finish reason."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + params.max_new_tokens, session_len):
        token = next_token(np.array(tokens, np.int32), vocab_size)
        if token in params.stop_ids:
            return tokens[len(prompt):], 'stop'
        tokens.append(token)
    return tokens[len(prompt):], 'length'


class GuessingDrafter:
    """Proposes up to ``most`` tokens, each of them right with probability ``accuracy``."""

    def __init__(self, vocab_size: int, *, most: int = 3, accuracy: float = 0.7, seed: int = 0) -> None:
        self.vocab_size, self.most, self.accuracy = vocab_size, most, accuracy
        self._random = np.random.default_rng(seed)

    def propose(self, request: Request, most: int) -> list[int]:
        """Draft tokens for ``request``."""
        tokens = list(request.tokens)
        drafts: list[int] = []
        for _ in range(min(most, self.most)):
            token = next_token(np.array(tokens, np.int32), self.vocab_size)
            if self._random.random() >= self.accuracy:
                token = (token + 1) % self.vocab_size
            drafts.append(token)
            tokens.append(token)
        return drafts


@dataclass(slots=True)
class _Slot:
    """A slot of the runner: its block table and the last token that was drawn in it."""

    params: SamplingParams
    known: int  # tokens that it was opened with
    table: list[int] = field(default_factory=list)
    last_token: int = EMPTY
    fresh: bool = True  # no row of it ran yet


class FakeHandle:
    """A launched step whose result is computed when it is launched, or only when it is asked for."""

    def __init__(self, executor: FakeExecutor, plan: StepPlan) -> None:
        self._executor, self._plan = executor, plan
        self._result: StepResult | None = None

    def compute(self) -> StepResult:
        """Run the step; once."""
        if self._result is None:
            self._result = self._executor.run(self._plan)
        return self._result

    def result(self) -> StepResult:
        """The step's result."""
        result = self.compute()
        for row in np.flatnonzero(result.status == NON_FINITE).tolist():
            self._executor.tainted.update(self._executor.slots[int(self._plan.slots[row])].table)
        return result


class FakeExecutor:
    """Runs plans on a cache of token ids, checking what a real device would silently accept.

    Args:
        capacity: what :meth:`start` returns.
        poisoned: sequences that give logits that are not finite.
        fail_at: the step whose launch raises.
        delayed: compute a step when its result is asked for or the next one is launched, not at its launch.
    """

    def __init__(self, capacity: Capacity, *, poisoned: Callable[[np.ndarray], bool] | None = None,
                 fail_at: int | None = None, delayed: bool = False) -> None:
        self.capacity = capacity
        self.poisoned = poisoned
        self.fail_at = fail_at
        self.delayed = delayed
        self.cache = np.full((capacity.num_blocks + 1, capacity.block_size), EMPTY, np.int32)
        self.seen = self.cache.copy()  # the same with what a picture's tokens are for the model
        self.pictures: dict[bytes, list[np.ndarray]] = {}  # encoded tiles
        self.encoded_tiles = 0
        self._layouts: dict[bytes, Layout] = {}
        self.sums = np.zeros((capacity.num_blocks + 1, capacity.block_size), np.uint32)
        self.tainted: set[int] = set()  # blocks that a row with bad logits read, as far as results were taken
        self.slots: dict[int, _Slot] = {}
        self.computed_tokens = 0
        self._steps: list[FakeHandle] = []

    def start(self) -> Capacity:
        """Nothing to load."""
        return self.capacity

    def launch(self, plan: StepPlan) -> FakeHandle:
        """Take a step in; see ``delayed``."""
        if plan.step == self.fail_at:
            raise RuntimeError(f'device error in step {plan.step}')
        for step in self._steps:
            step.compute()
        handle = FakeHandle(self, plan)
        self._steps = [handle]
        if not self.delayed:
            handle.compute()
        return handle

    def call(self, name: str, *args: object) -> list[object]:
        """There are no workers."""
        return []

    def stop(self) -> None:
        """Forget everything."""
        self.slots.clear()

    def run(self, plan: StepPlan) -> StepResult:
        """What a device does with a plan: write all rows, then read them all."""
        for slot in plan.closed:
            del self.slots[slot]
        for opened in plan.opened:
            assert opened.slot not in self.slots, 'a slot is opened while it is open'
            self.slots[opened.slot] = _Slot(opened.params, len(opened.tokens))
        places = self._encode(plan)
        assert plan.num_tokens <= self.capacity.max_step_tokens, 'the token budget is exceeded'
        assert plan.rows <= self.capacity.max_batch_size, 'too many rows'
        assert len(set(plan.slots.tolist())) == plan.rows, 'two rows for one slot'
        for row in range(plan.rows):
            self._write(plan, row, places)
        masks: dict[int, np.ndarray] = {}
        if plan.mask_rows is not None and plan.masks is not None:
            masks = dict(zip(plan.mask_rows.tolist(), plan.masks))
        result = StepResult(plan.step, np.zeros(plan.rows, np.uint8), np.zeros(plan.rows + 1, np.int32),
                            np.zeros(0, np.int32))
        tokens: list[int] = []
        for row in range(plan.rows):
            tokens += self._read(plan, row, masks.get(row), result)
            result.token_start[row + 1] = len(tokens)
        result.tokens = np.array(tokens, np.int32)
        self.computed_tokens += plan.num_tokens
        return result

    def _encode(self, plan: StepPlan) -> dict[int, int]:
        """Forget and encode pictures; what stands at the step's tokens of pictures."""
        for digest in plan.forget:
            self.pictures.pop(digest, None)
        for encode in plan.encode:
            tiles = self.pictures.setdefault(encode.picture, [])
            assert encode.first == len(tiles), 'a tile is encoded twice, or left out'
            tiles += list(encode.pixels)
            self.encoded_tiles += len(encode.pixels)
            assert 0 < len(encode.pixels) and len(tiles) <= encode.layout.tiles, 'more tiles than the picture has'
            self._layouts[encode.picture] = encode.layout
        held = sum(self._layouts[digest].tokens for digest in self.pictures)
        room = self.capacity.pictures
        assert room is None or held <= room.tokens, 'more pictures than there is room for'
        found: dict[int, int] = {}
        for place in plan.places:
            tiles, layout = self.pictures[place.picture], self._layouts[place.picture]
            assert len(tiles) == layout.tiles, 'a picture is read before it is encoded'
            values = embeddings(np.stack(tiles), layout.tokens)[place.offset:place.offset + place.count]
            assert len(values) == place.count, 'more tokens than the picture has'
            found |= {place.token + i: int(value) for i, value in enumerate(values)}
        return found

    def _write(self, plan: StepPlan, row: int, places: dict[int, int]) -> None:
        slot = self.slots[int(plan.slots[row])]
        slot.table += plan.blocks[plan.block_start[row]:plan.block_start[row + 1]].tolist()
        ids = plan.tokens[plan.query_start[row]:plan.query_start[row + 1]].copy()
        if ids[0] == PENDING:
            assert slot.last_token != EMPTY, 'a row continues a token that was never drawn'
            ids[0] = slot.last_token
        assert (ids >= 0).all(), 'only the first token of a row may be unknown'
        start, size = int(plan.starts[row]), self.capacity.block_size
        positions = np.arange(start, start + len(ids))
        assert positions[-1] < self.capacity.session_len, 'a position beyond the context'
        blocks = np.array(slot.table, np.int32)[positions // size]
        assert (blocks > 0).all(), 'the null block is written'
        self.cache[blocks, positions % size] = ids
        if places:
            first = int(plan.query_start[row])
            ids = np.array([places.get(first + i, token) for i, token in enumerate(ids.tolist())], np.int32)
        self.seen[blocks, positions % size] = ids
        self.tainted.difference_update(blocks.tolist())
        self._sum(slot, start, ids)

    def _sum(self, slot: _Slot, start: int, ids: np.ndarray) -> None:
        """Continue the checksum of what lies before ``start``; a slot's first row checks that of its found blocks."""
        size, total = self.capacity.block_size, 0
        if start:
            total = int(self.sums[slot.table[(start - 1) // size], (start - 1) % size])
        if slot.fresh:
            before = self.seen[slot.table[:-(-start // size)]].reshape(-1)[:start]
            assert total == (score(before) if start else 0), 'found blocks that were computed after other tokens'
            slot.fresh = False
        for position, token in enumerate(ids.tobytes()[i:i + 4] for i in range(0, 4 * len(ids), 4)):
            total = zlib.crc32(token, total)
            self.sums[slot.table[(start + position) // size], (start + position) % size] = total

    def _read(self, plan: StepPlan, row: int, mask: np.ndarray | None, result: StepResult) -> list[int]:
        slot = self.slots[int(plan.slots[row])]
        start, size = int(plan.starts[row]), self.capacity.block_size
        length = int(plan.query_start[row + 1] - plan.query_start[row])
        stop = start + length
        sequence = self.seen[slot.table[:-(-stop // size)]].reshape(-1)[:stop]
        outputs, drafts = int(plan.outputs[row]), int(plan.drafts[row])
        assert outputs != OUTPUT_NONE or not plan.sample[row], 'a row draws without logits'
        assert outputs != OUTPUT_NONE or start < slot.known, 'a row is for nothing'
        if outputs == OUTPUT_NONE:
            return []
        first = start if outputs == OUTPUT_ALL else stop - 1
        scores = None
        if slot.params.output_logits or slot.params.output_hidden:
            scores = np.array([[score(sequence[:end + 1])] for end in range(first, stop)], np.float64)
        if slot.params.output_logits:
            result.logits[row] = scores
        if slot.params.output_hidden:
            result.hidden[row] = scores
        if not plan.sample[row]:
            return []
        return self._draw(sequence, row, drafts, mask, slot, result)

    def _draw(self, sequence: np.ndarray, row: int, drafts: int, mask: np.ndarray | None, slot: _Slot,
              result: StepResult) -> list[int]:
        """Accept drafts as long as they are what follows, and one token more. A bad position ends the row's acceptance;
        its status is bad only if nothing was accepted, so that good tokens before it are not lost."""
        accepted: list[int] = []
        for end in range(len(sequence) - drafts, len(sequence) + 1):
            seen, status = sequence[:end], OK
            token = next_token(seen, self.capacity.vocab_size, mask)
            if self.poisoned is not None and self.poisoned(seen):
                status = NON_FINITE
            elif token < 0:
                status = DEAD_MASK
            if status != OK:
                if not accepted:
                    result.status[row] = status
                    slot.last_token = 0  # a step launched meanwhile reads an id that is valid and means nothing
                    return []
                break
            accepted.append(token)
            if end < len(sequence) and token != sequence[end]:
                break
        slot.last_token = accepted[-1]
        return accepted
