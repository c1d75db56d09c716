"""inputs.build against the plainest construction, over random plans."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine.plan import OUTPUT_ALL, OUTPUT_LAST, OUTPUT_NONE, PENDING
from lmdeploy.runner import inputs
from lmdeploy.runner.slots import SlotTable
from tests.runner.plans import Row, make_plan

SIZE = 4  # tokens per block: small, so that tables have many blocks
SLOTS = 6


@st.composite
def steps(draw):
    """Rows of distinct slots, with the tokens that are in the cache before and the last token of each slot."""
    slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
    rows = []
    for slot in slots:
        start, length = draw(st.integers(0, 60)), draw(st.integers(1, 40))
        drafts = draw(st.integers(0, min(3, length - 1)))
        tokens = draw(st.lists(st.integers(0, 999), min_size=length, max_size=length))
        if draw(st.booleans()):
            tokens[0] = PENDING
        outputs = draw(st.sampled_from([OUTPUT_NONE, OUTPUT_LAST, OUTPUT_ALL]))
        rows.append(Row(slot, start, tokens, [], outputs, outputs != OUTPUT_NONE and draw(st.booleans()), drafts))
    return rows


@settings(max_examples=80, deadline=None)
@given(steps(), st.randoms(use_true_random=False))
def test_every_index_is_that_of_the_plain_construction(rows, random):
    table = SlotTable(SLOTS, 512, SIZE, torch.device('cpu'))
    table.last_token[:] = torch.arange(SLOTS) + 5000
    ids = random.sample(range(1, 1000), 400)
    owned = {}
    for row in rows:  # blocks for the tokens of earlier steps, then this step's new ones come with the plan
        before, after = -(-row.start // SIZE), -(-(row.start + len(row.tokens)) // SIZE)
        owned[row.slot] = [ids.pop() for _ in range(after)]
        table.append(np.array([row.slot]), np.array([0, before]), np.array(owned[row.slot][:before], np.int32))
        row.blocks = owned[row.slot][before:]
    plan = make_plan(rows)
    table.append(plan.slots, plan.block_start, plan.blocks)
    batch, outputs = inputs.build(plan, table)

    token_ids, positions, kv_slots, wanted, out_rows, sampled, start = [], [], [], [], [], [], [0]
    for index, row in enumerate(rows):
        first = len(token_ids)
        for offset, token in enumerate(row.tokens):
            position = row.start + offset
            token_ids.append(5000 + row.slot if token == PENDING else token)
            positions.append(position)
            kv_slots.append(owned[row.slot][position // SIZE] * SIZE + position % SIZE)
        length = len(row.tokens)
        count = {OUTPUT_NONE: 0, OUTPUT_LAST: 1 + row.drafts, OUTPUT_ALL: length}[row.outputs]
        for offset in range(length - count, length):
            if row.sample and offset >= length - 1 - row.drafts:
                sampled.append(len(wanted))
            wanted.append(first + offset)
            out_rows.append(index)
        start.append(len(wanted))
    assert batch.token_ids.tolist() == token_ids and batch.token_ids.dtype == torch.int32
    assert batch.positions.tolist() == positions
    assert batch.kv_slots.tolist() == kv_slots and batch.kv_slots.dtype == torch.int64
    assert batch.output_rows.tolist() == wanted == outputs.tokens.tolist()
    assert outputs.rows.tolist() == out_rows
    assert outputs.start.tolist() == start
    assert outputs.sampled.tolist() == sampled
    assert outputs.positions.tolist() == [positions[token] for token in wanted]
    lens = [row.start + len(row.tokens) for row in rows]
    assert batch.host_kv_lens == batch.kv_lens.tolist() == lens and batch.max_kv == max(lens)
    assert batch.host_query_start == batch.query_start.tolist() == plan.query_start.tolist()
    assert batch.max_query == max(len(row.tokens) for row in rows)
    width = -(-max(lens) // SIZE)
    for row, found in zip(rows, batch.block_table.tolist()):
        assert found == (owned[row.slot] + [0] * width)[:width]
