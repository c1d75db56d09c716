"""What enters the engine, what leaves it, and the host's view of one generation in between.

Life of a request: added -> waiting (or parked, behind the leader of its group) -> running <-> preempted -> finished.
Waiting requests hold nothing; running ones hold a slot and blocks, and keep both after their finish until no launched
step touches them any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from lmdeploy.config.vision import Layout
from lmdeploy.engine.block_pool import block_key
from lmdeploy.engine.plan import Logprobs
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import LmdeployError

if TYPE_CHECKING:
    from lmdeploy.engine.groups import Group

NEVER = 1 << 62  # a position that no request reaches


class Grammar(Protocol):
    """Constrains what a request may say next. Its state follows the accepted tokens."""

    def fill(self, mask: np.ndarray) -> None:
        """Write the allowed tokens into ``mask``, ``[ceil(vocab / 32)] uint32``, bit set = allowed."""
        ...

    def accept(self, token: int) -> None:
        """``token`` was generated."""
        ...


class Drafter(Protocol):
    """Guesses tokens that may come next; the model verifies them all in one step."""

    def propose(self, request: Request, most: int) -> list[int]:
        """At most ``most`` tokens that may follow ``request.tokens``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageSpan:
    """Placeholder tokens ``start .. end - 1`` stand for an image.

    Attributes:
        digest: of its pixels and of how they were made.
        layout: its tiles and tokens.
        pixels: ``[tiles, 3, H, W] uint8``.
    """

    start: int
    end: int
    digest: bytes
    layout: Layout
    pixels: np.ndarray = field(repr=False)


@dataclass(slots=True)
class EngineInput:
    """One request, checked and in numbers only.

    Attributes:
        id: unique among the requests that have not finished.
        tokens: the prompt, at least one token.
        salt: cached blocks are shared only between requests of equal salt, tenant and adapter.
        tenant: requests of several tenants are admitted fairly.
        priority: the higher goes first.
        images: the prompt's image spans.
        share: requests that name the same group share the blocks of their common prompt, with or without prefix cache.
        grammar: constrains the output.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    salt: bytes = b''
    tenant: str = ''
    priority: int = 0
    images: tuple[ImageSpan, ...] = ()
    share: str | None = None
    adapter: str = ''
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended.

    ``stop``: a stop id was drawn; ``length``: max_new_tokens or the context is used up; ``abort``: somebody asked for
    it; ``error``: :attr:`error` says why.
    """

    reason: Literal['stop', 'length', 'abort', 'error']
    stop_id: int | None = None
    error: LmdeployError | None = None


@dataclass(slots=True)
class TokenDelta:
    """What a step added to one request. The last delta of a request, and only that, has a :attr:`finish`.

    ``logits [rows, vocab]`` and ``hidden [rows, hidden]`` are rows of the positions asked for, in order and without
    gaps over all deltas of a request that generated n tokens: for ``'generation'`` the n rows from which its tokens
    were drawn, for ``'all'`` the rows of positions 0 to ``prompt_len + n - 2`` (of the whole prompt where n = 0). The
    row that drew a stop id is not among the generated ones.
    """

    id: str
    tokens: list[int]
    finish: Finish | None = None
    logprobs: Logprobs | None = None
    logits: Any = None
    hidden: Any = None
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    prompt_len: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """The host's view of one generation.

    Invariants (``known = len(tokens)``, ``total = known + pending``):
        1. ``settled <= computed <= total``, and ``settled <= known``.
        2. ``pending <= in_flight * (1 + drafts)``; without a launched step nothing is pending.
        3. the blocks cover ``computed`` tokens; the table only grows until the request leaves its slot.
        4. without a slot: no blocks, nothing computed, in flight or published, no images held.
        5. ``published`` blocks, and no others, may be in the prefix index under this request's digests.
    """

    id: str
    seq: int  # order of arrival
    tokens: list[int]  # prompt, then accepted output
    prompt_len: int
    params: SamplingParams
    limit: int  # ends with 'length' when it has this many tokens
    tenant: str = ''
    priority: int = 0
    images: tuple[ImageSpan, ...] = ()
    images_end: int = 0  # the end of the last one
    grammar: Grammar | None = None
    group: Group | None = None
    root: bytes | None = None  # parent key of its first block; None: its blocks are not shared
    publish_limit: int = 0  # blocks from here on are never published
    stop_ids: frozenset[int] = frozenset()

    computed: int = 0  # tokens whose KV a launched step writes; rolls back when drafts are rejected
    settled: int = 0  # tokens whose KV a retired step has written
    pending: int = 0  # sampled tokens that the host has not seen
    in_flight: int = 0  # launched, unretired steps that have a row of it
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # chained digest of each full block of known tokens
    published: int = 0  # leading blocks that were offered to, or taken from, the prefix index
    publish_at: int = NEVER  # the value of ``settled`` at which the next block may be published
    slot: int = -1
    finish: Finish | None = None
    cached_tokens: int = 0
    image_at: int = 0  # the first image of which not everything is computed
    told: int = 0  # blocks that the runner knows
    held: int = 0  # so many images from there on have their place among the device's pictures
    rows_out: int = 0  # output positions handed out so far, for 'all'
    preempted: bool = False

    # what makes a row more than an id and a position, decided once (see lmdeploy.engine.intake)
    serial: bool = False  # a row that samples waits until all earlier tokens are known
    all_rows: bool = False  # logits or hidden states of every position
    outputs: bool = False  # any logits, hidden states or log-probabilities
    plain: bool = False  # neither serial nor all_rows
    usual: bool = False  # plain, and no outputs

    @property
    def total(self) -> int:
        """Tokens that exist, known to the host or not."""
        return len(self.tokens) + self.pending

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: the smaller goes first and is preempted last."""
        return (-self.priority, self.seq)

    def extend_hashes(self, blocks: int, block_size: int) -> None:
        """Make :attr:`hashes` cover the first ``blocks`` blocks, all of whose tokens are known."""
        hashes = self.hashes
        start = len(hashes)
        if start >= blocks:
            return
        ids = np.array(self.tokens[start * block_size:blocks * block_size], np.int32).tobytes()
        width = 4 * block_size
        parent = hashes[-1] if hashes else self.root
        assert parent is not None
        for i in range(start, blocks):
            media = self._media(i * block_size, (i + 1) * block_size) if self.images else b''
            at = (i - start) * width
            parent = block_key(parent, ids[at:at + width], media)
            hashes.append(parent)

    def _media(self, start: int, end: int) -> bytes:
        """Digests of the images whose placeholders lie in ``start .. end - 1``, with where they begin."""
        parts = []
        for span in self.images:
            if span.start < end and span.end > start:
                offset = (span.start - start).to_bytes(8, 'big', signed=True)
                parts.append(len(span.digest).to_bytes(2, 'big') + span.digest + offset)
        return b''.join(parts)
