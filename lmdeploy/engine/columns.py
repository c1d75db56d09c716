"""Columns: the rows of a step while it is being planned.

Rows come in three kinds, in this order in the plan: steady ones (one token, one draw, no new block; nearly all rows of
a busy engine, so that they are lean), other decodes, and prefill chunks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lmdeploy.engine.plan import OUTPUT_ALL, OUTPUT_LAST, OUTPUT_NONE, PENDING, Encode, OpenSlot, Place, StepPlan
from lmdeploy.engine.request import Request


class Steady:
    """Rows of which slot, position and token say everything."""

    __slots__ = ('slots', 'starts', 'tokens')

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.starts: list[int] = []
        self.tokens: list[int] = []


class Columns:
    """Plain lists, one entry per row (``tokens``, ``blocks``: per token, per new block), turned into arrays once."""

    __slots__ = ('slots', 'starts', 'lengths', 'tokens', 'counts', 'blocks', 'outputs', 'sample', 'drafts', 'masks',
                 'places')

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
        self.places: list[Place] = []

    def append(self, request: Request, stop: int, drafts: list[int], blocks: list[int], sample: bool) -> None:
        """A row from the request's computed tokens up to position ``stop``, with drafts after it and new blocks."""
        start = request.computed
        self.slots.append(request.slot)
        self.starts.append(start)
        self.lengths.append(stop - start + len(drafts))
        if start < request.images_end:
            self._place(request, start, stop)
        self.tokens += request.tokens[start:stop]
        if stop > len(request.tokens):
            self.tokens.append(PENDING)
        self.tokens += drafts
        self.counts.append(len(blocks))
        self.blocks += blocks
        if drafts or (request.all_rows and stop > request.rows_out):
            self.outputs.append(OUTPUT_ALL)
        else:
            self.outputs.append(OUTPUT_LAST if sample else OUTPUT_NONE)
        self.sample.append(sample)
        self.drafts.append(len(drafts))

    def _place(self, request: Request, start: int, stop: int) -> None:
        """Which tokens of a row, that begins with the next one, are those of images."""
        at = len(self.tokens) - start
        for span in request.images[request.image_at:]:
            if span.start >= stop:
                break
            first = max(span.start, start)
            self.places.append(Place(at + first, min(span.end, stop) - first, span.digest, first - span.start))


def build(step: int, steady: Steady, decode: Columns, prefill: Columns, opened: tuple[OpenSlot, ...],
          closed: tuple[int, ...], encode: tuple[Encode, ...], forget: tuple[bytes, ...]) -> StepPlan:
    """One plan of all rows."""
    first = len(steady.slots)
    if not decode.slots and not prefill.slots:
        return StepPlan(
            step=step,
            slots=np.array(steady.slots, np.int32),
            starts=np.array(steady.starts, np.int32),
            query_start=np.arange(first + 1, dtype=np.int32),
            tokens=np.array(steady.tokens, np.int32),
            block_start=np.zeros(first + 1, np.int32),
            blocks=np.zeros(0, np.int32),
            outputs=np.full(first, OUTPUT_LAST, np.uint8),
            sample=np.ones(first, np.bool_),
            drafts=np.zeros(first, np.int32),
            opened=opened,
            closed=closed,
            encode=encode,
            forget=forget,
        )
    before = first + len(decode.tokens)
    places = [replace(place, token=first + place.token) for place in decode.places]
    places += [replace(place, token=before + place.token) for place in prefill.places]
    masks = [(first + row, mask) for row, mask in decode.masks]
    masks += [(first + len(decode.slots) + row, mask) for row, mask in prefill.masks]
    return StepPlan(
        step=step,
        slots=np.array(steady.slots + decode.slots + prefill.slots, np.int32),
        starts=np.array(steady.starts + decode.starts + prefill.starts, np.int32),
        query_start=_offsets([1] * first + decode.lengths + prefill.lengths),
        tokens=np.array(steady.tokens + decode.tokens + prefill.tokens, np.int32),
        block_start=_offsets([0] * first + decode.counts + prefill.counts),
        blocks=np.array(decode.blocks + prefill.blocks, np.int32),
        outputs=np.array([OUTPUT_LAST] * first + decode.outputs + prefill.outputs, np.uint8),
        sample=np.array([True] * first + decode.sample + prefill.sample, np.bool_),
        drafts=np.array([0] * first + decode.drafts + prefill.drafts, np.int32),
        opened=opened,
        closed=closed,
        encode=encode,
        places=tuple(places),
        forget=forget,
        mask_rows=np.array([row for row, _ in masks], np.int32) if masks else None,
        masks=np.stack([mask for _, mask in masks]) if masks else None,
    )


def _offsets(lengths: list[int]) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
