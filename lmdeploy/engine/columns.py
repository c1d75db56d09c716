"""Columns: the rows of a step while it is being planned."""

from __future__ import annotations

import numpy as np

from lmdeploy.engine.plan import OpenSlot, StepPlan


class Columns:
    """Plain lists, one entry per row (``tokens``, ``blocks``: per token, per new block), turned into arrays once."""

    __slots__ = ('slots', 'starts', 'lengths', 'tokens', 'counts', 'blocks', 'outputs', 'sample', 'drafts', 'masks')

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.tokens: list[int] = []
        self.counts: list[int] = []  # new blocks
        self.blocks: list[int] = []
        self.outputs: list[int] = []
        self.sample: list[bool] = []
        self.drafts: list[int] = []
        self.masks: list[tuple[int, np.ndarray]] = []  # (row, mask)


def build(step: int, decode: Columns, prefill: Columns, opened: tuple[OpenSlot, ...], closed: tuple[int, ...]) -> StepPlan:
    """One plan, rows that decode first."""
    first = len(decode.slots)
    masks = decode.masks + [(first + row, mask) for row, mask in prefill.masks]
    return StepPlan(
        step=step,
        slots=_int32(decode.slots, prefill.slots),
        starts=_int32(decode.starts, prefill.starts),
        query_start=_offsets(decode.lengths, prefill.lengths),
        tokens=_int32(decode.tokens, prefill.tokens),
        block_start=_offsets(decode.counts, prefill.counts),
        blocks=_int32(decode.blocks, prefill.blocks),
        outputs=np.array(decode.outputs + prefill.outputs, np.uint8),
        sample=np.array(decode.sample + prefill.sample, np.bool_),
        drafts=_int32(decode.drafts, prefill.drafts),
        opened=opened,
        closed=closed,
        mask_rows=np.array([row for row, _ in masks], np.int32) if masks else None,
        masks=np.stack([mask for _, mask in masks]) if masks else None,
    )


def _int32(first: list[int], second: list[int]) -> np.ndarray:
    return np.array(first + second if second else first, np.int32)


def _offsets(first: list[int], second: list[int]) -> np.ndarray:
    offsets = np.zeros(len(first) + len(second) + 1, np.int32)
    np.cumsum(first + second if second else first, out=offsets[1:])
    return offsets
