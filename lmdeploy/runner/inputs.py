"""From a StepPlan and the slots to a ForwardBatch, and to the list of positions whose logits are wanted.

Everything is computed on the host with whole-array numpy; the device gets one copy of one buffer. What only the device
knows is read there: tokens (``PENDING``) from ``slots.last_token``, and blocks from the tables of a device that has
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.plan import OUTPUT_ALL, OUTPUT_NONE, PENDING, StepPlan
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.runner.slots import SlotTable
from lmdeploy.runner.tables import send


@dataclass(slots=True)
class Outputs:
    """The R positions of a step that give outputs, in the order of rows; host arrays.

    Row i's are ``start[i]:start[i + 1]``: none, its last ``1 + drafts``, or all of its query.
    """

    start: np.ndarray  # [B+1] int64
    rows: np.ndarray  # [R] int64: the plan's row
    tokens: np.ndarray  # [R] int64: which of the T query tokens
    positions: np.ndarray  # [R] int64: position in its request
    sampled: np.ndarray  # [S] int64: the outputs that a token is drawn from: the last 1 + drafts of each sampling row


def build(plan: StepPlan, slots: SlotTable) -> tuple[ForwardBatch, Outputs]:
    """The forward pass of ``plan``, whose slots are open and whose blocks are appended already."""
    query_start = plan.query_start.astype(np.int64)
    lengths = np.diff(query_start)
    starts = plan.starts.astype(np.int64)
    rows = np.repeat(np.arange(plan.rows), lengths)
    positions = np.arange(plan.num_tokens) - query_start[rows] + starts[rows]
    kv_lens = starts + lengths
    size = slots.block_size
    max_kv = int(kv_lens.max())
    if slots.tables is not None:
        return _on_device(plan, slots, rows, positions, query_start, kv_lens)
    table = slots.blocks[plan.slots, : -(-max_kv // size)]
    kv_slots = table[rows, positions // size].astype(np.int64) * size + positions % size
    pending = np.flatnonzero(plan.tokens == PENDING)
    outputs = _outputs(plan, rows, positions, lengths, query_start)

    device = slots.device
    (token_ids, positions_, query_start_, kv_lens_, table_, kv_slots_, output_rows, pending_, pending_slots) = upload(
        device, np.maximum(plan.tokens, 0), _turned(plan, slots, rows, positions), query_start, kv_lens, table,
        kv_slots, outputs.tokens, pending, plan.slots[rows[pending]],
    )  # fmt: skip
    token_ids = token_ids.int()
    if len(pending):
        token_ids[pending_] = slots.last_token[pending_slots]
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=positions_.int(),
        kv_slots=kv_slots_,
        query_start=query_start_.int(),
        kv_lens=kv_lens_.int(),
        block_table=table_.int(),
        output_rows=output_rows,
        max_query=int(lengths.max()),
        max_kv=max_kv,
        host_query_start=query_start.tolist(),
        host_kv_lens=kv_lens.tolist(),
    )
    return batch, outputs


def _on_device(plan: StepPlan, slots: SlotTable, rows: np.ndarray, positions: np.ndarray, query_start: np.ndarray,
               kv_lens: np.ndarray) -> tuple[ForwardBatch, Outputs]:
    """:func:`build` where block tables lie on the device: only what differs from token to token is sent."""
    assert slots.tables is not None
    lengths = np.diff(query_start)
    outputs = _outputs(plan, rows, positions, lengths, query_start)
    tokens, positions_, slot_of, query_start_, kv_lens_, row_slots, output_rows = send(
        slots.device, *(array.astype(np.int32, copy=False) for array in (
            plan.tokens, positions, plan.slots[rows], query_start, kv_lens, plan.slots, outputs.tokens)))
    turned = _turned(plan, slots, rows, positions)
    at, size, blocks = slot_of.long(), slots.block_size, slots.tables.blocks
    block = blocks.view(-1)[at * blocks.shape[1] + positions_ // size]
    longer = np.flatnonzero(lengths != 1)
    batch = ForwardBatch(
        token_ids=torch.where(tokens < 0, slots.last_token[at], tokens),
        positions=positions_ if turned is positions else send(slots.device, turned.astype(np.int32))[0],
        kv_slots=block.long() * size + positions_ % size,
        query_start=query_start_,
        kv_lens=kv_lens_,
        block_table=blocks,
        output_rows=output_rows.long(),
        max_query=int(lengths.max()),
        max_kv=int(kv_lens.max()),
        host_query_start=query_start.tolist(),
        host_kv_lens=kv_lens.tolist(),
        table_rows=row_slots,
        num_decode=int(longer[0]) if len(longer) else plan.rows,
    )
    if slots.device.type == 'cpu':
        batch.block_table, batch.table_rows = batch.tables(), torch.arange(plan.rows, dtype=torch.int32)
    return batch, outputs


def _turned(plan: StepPlan, slots: SlotTable, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The positions by which queries and keys are turned: ``positions [T]`` but for prompts with pictures, where they
    have three rows ``[3, T]`` as long as there is a picture to come."""
    if not slots.mrope:
        return positions
    turned = positions + slots.shift[plan.slots][rows]
    ends = slots.turns_end[plan.slots]
    inside = np.flatnonzero(plan.starts < ends)
    if not len(inside):
        return turned
    turned = np.repeat(turned[None], 3, 0)
    for row in inside.tolist():
        first, start = int(plan.query_start[row]), int(plan.starts[row])
        stop = min(int(plan.query_start[row + 1]) - first + start, int(ends[row]))
        known = slots.turns[plan.slots[row]]
        assert known is not None
        turned[:, first : first + stop - start] = known[:, start:stop]
    return turned


def _outputs(plan: StepPlan, rows: np.ndarray, positions: np.ndarray, lengths: np.ndarray,
             query_start: np.ndarray) -> Outputs:
    last = 1 + plan.drafts.astype(np.int64)
    counts = np.where(plan.outputs == OUTPUT_ALL, lengths, np.where(plan.outputs == OUTPUT_NONE, 0, last))
    start = np.concatenate([[0], np.cumsum(counts)])
    output_rows = np.repeat(np.arange(plan.rows), counts)
    tokens = np.arange(start[-1]) - start[1:][output_rows] + query_start[1:][output_rows]  # the row's last counts[row]
    sampling = plan.sample[output_rows] & (np.arange(start[-1]) >= (start[1:] - last)[output_rows])
    return Outputs(start, output_rows, tokens, positions[tokens], np.flatnonzero(sampling))


def single_outputs(plan: StepPlan) -> Outputs:
    """The outputs of a plan whose rows have one token each and draw one."""
    every = np.arange(plan.rows + 1)
    return Outputs(every, every[:-1], every[:-1], plan.starts.astype(np.int64), every[:-1])


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """The integer ``arrays`` as int64 tensors of the same shapes on ``device``: one buffer, one copy."""
    return send(device, *(array.astype(np.int64, copy=False) for array in arrays))
