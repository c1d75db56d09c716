"""StepPlan and StepResult: the protocol between the scheduler and every rank, one message per step each way.

Both are structs of numpy arrays, so that they travel as a fixed header and raw buffers and never as pickled objects.
``engine.plan`` and ``engine.sampling`` are the only modules of the engine that runner and executor import.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmdeploy.config.vision import Layout

# rows' output ranges: which positions of the row's query give logits
OUTPUT_NONE, OUTPUT_LAST, OUTPUT_ALL = 0, 1, 2
# rows' statuses
OK, NON_FINITE, DEAD_MASK, PROCESSOR_FAILED, NO_MEMORY = 0, 1, 2, 3, 4
# a token that only the device knows yet: read ``slots.last_token[slot]``
PENDING = -1


@dataclass(frozen=True, slots=True)
class PictureRoom:
    """What the device holds of pictures, and how fast it encodes them.

    Attributes:
        tokens: embeddings that it keeps.
        patches: a tile costs so many as the tower computes positions for it; so many may be encoded per step while
            texts are running, on average, that those keep their pace,
        patches_alone: and so many in a step at most.
        pictures: of so many pictures in a step at most; None: any number.
    """

    tokens: int
    patches: int
    patches_alone: int
    pictures: int | None = None


@dataclass(frozen=True, slots=True)
class OpenSlot:
    """A request enters a slot of the runner (at admission, and again after a preemption).

    Attributes:
        slot: index into the runner's slot tables.
        params: a :class:`lmdeploy.engine.sampling.SamplingParams`.
        tokens: all tokens known so far, prompt then accepted output, ``[n] int32``.
        prompt_len: how many of them are the prompt's. ``n - prompt_len`` is the index of the next draw.
        grids: the pictures of its prompt: first token, rows and columns of tokens.
    """

    slot: int
    params: Any
    tokens: np.ndarray
    prompt_len: int
    grids: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Encode:
    """Some tiles of a picture, which are encoded before the step's rows run.

    Attributes:
        picture: its digest.
        first: the number of the first of them; those before it were listed in earlier steps.
        pixels: ``[n, 3, H, W] uint8``.
        layout: of the whole picture.
    """

    picture: bytes
    first: int
    pixels: np.ndarray
    layout: Layout


@dataclass(frozen=True, slots=True)
class Place:
    """The step's tokens ``token .. token + count - 1`` are embeddings of a picture, from number ``offset`` on."""

    token: int
    count: int
    picture: bytes
    offset: int


@dataclass(slots=True)
class StepPlan:
    """One step: B rows with T query tokens in all. Row i's query is ``tokens[query_start[i]:query_start[i+1]]``.

    Before the rows run, ``closed`` slots are released and then ``opened`` ones set up; pictures are forgotten, and then
    others encoded. A row's new blocks are appended to its slot's block table; the table restarts empty when a slot is
    opened.
    """

    step: int
    slots: np.ndarray  # [B] int32
    starts: np.ndarray  # [B] int32: position of the row's first query token
    query_start: np.ndarray  # [B+1] int32
    tokens: np.ndarray  # [T] int32, PENDING where only the device knows; draft ids may follow the first
    block_start: np.ndarray  # [B+1] int32
    blocks: np.ndarray  # [sum] int32: new blocks of row i are blocks[block_start[i]:block_start[i+1]]
    outputs: np.ndarray  # [B] uint8: OUTPUT_NONE | OUTPUT_LAST | OUTPUT_ALL
    sample: np.ndarray  # [B] bool: draw a token from the last position's logits
    drafts: np.ndarray  # [B] int32: how many of the row's last query tokens are drafts
    opened: tuple[OpenSlot, ...] = ()
    closed: tuple[int, ...] = ()
    encode: tuple[Encode, ...] = ()
    places: tuple[Place, ...] = ()  # by token
    forget: tuple[bytes, ...] = ()  # pictures whose embeddings are not needed any more
    mask_rows: np.ndarray | None = None  # [M] int32: the rows that have a grammar mask
    masks: np.ndarray | None = None  # [M, ceil(vocab/32)] uint32, bit set = token allowed

    @property
    def rows(self) -> int:
        return len(self.slots)

    @property
    def work(self) -> bool:
        """Whether there is anything to launch."""
        return bool(len(self.slots) or self.opened or self.encode)

    @property
    def num_tokens(self) -> int:
        return int(self.query_start[-1]) if len(self.query_start) else 0


@dataclass(slots=True)
class Logprobs:
    """Per accepted token n: its log-probability and the k best, ``chosen [n]``, ``ids [n, k]``, ``values [n, k]``."""

    chosen: np.ndarray
    ids: np.ndarray
    values: np.ndarray


@dataclass(slots=True)
class StepResult:
    """What a step gave. Row i accepted ``tokens[token_start[i]:token_start[i+1]]``: 0 to k of them."""

    step: int
    status: np.ndarray  # [B] uint8
    token_start: np.ndarray  # [B+1] int32
    tokens: np.ndarray  # [sum] int32
    logprobs: dict[int, Logprobs] = field(default_factory=dict)  # by row
    logits: dict[int, Any] = field(default_factory=dict)  # by row: [positions, vocab] float32 CPU tensor
    hidden: dict[int, Any] = field(default_factory=dict)  # by row: [positions, hidden] float32 CPU tensor
    errors: dict[int, str] = field(default_factory=dict)  # by row: why its status is not OK, for the log
    lost: str = ''  # why the pictures of its ``encode`` could not be encoded: memory ran out
