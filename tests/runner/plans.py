"""Plans from plain Python rows, for tests of the runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lmdeploy.engine.plan import OUTPUT_LAST, OpenSlot, StepPlan
from lmdeploy.engine.sampling import SamplingParams


@dataclass
class Row:
    """One row of a plan."""

    slot: int
    start: int
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    outputs: int = OUTPUT_LAST
    sample: bool = True
    drafts: int = 0


def make_plan(rows: list[Row], *, step: int = 1, opened: tuple[OpenSlot, ...] = (), closed: tuple[int, ...] = (),
              masks: dict[int, np.ndarray] | None = None) -> StepPlan:
    """A StepPlan; ``masks`` are packed, by row."""

    def offsets(lengths: list[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def flat(lists: list[list[int]]) -> np.ndarray:
        return np.array([value for values in lists for value in values], np.int32)

    return StepPlan(
        step=step,
        slots=np.array([row.slot for row in rows], np.int32),
        starts=np.array([row.start for row in rows], np.int32),
        query_start=offsets([len(row.tokens) for row in rows]),
        tokens=flat([row.tokens for row in rows]),
        block_start=offsets([len(row.blocks) for row in rows]),
        blocks=flat([row.blocks for row in rows]),
        outputs=np.array([row.outputs for row in rows], np.uint8),
        sample=np.array([row.sample for row in rows], bool),
        drafts=np.array([row.drafts for row in rows], np.int32),
        opened=opened,
        closed=closed,
        mask_rows=np.array(list(masks), np.int32) if masks else None,
        masks=np.stack(list(masks.values())) if masks else None,
    )


def opening(slot: int, tokens: list[int], prompt_len: int | None = None, **params: object) -> OpenSlot:
    """A request that enters a slot with ``tokens`` known; ``params`` are fields of SamplingParams."""
    known = np.array(tokens, np.int32)
    return OpenSlot(slot, SamplingParams(**params), known, len(tokens) if prompt_len is None else prompt_len)
