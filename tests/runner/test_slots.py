"""Slots: a new request finds nothing of the old one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmdeploy.runner.slots import SlotTable
from tests.runner.plans import opening


@pytest.fixture
def slots():
    return SlotTable(4, 64, 16, torch.device('cpu'))


def test_blocks_are_appended_in_order_and_the_table_grows(slots):
    slots.append(np.array([2, 0]), np.array([0, 3, 4]), np.array([5, 6, 7, 8]))
    slots.append(np.array([0, 2]), np.array([0, 0, 20]), np.arange(20, 40))
    assert slots.blocks[2, :23].tolist() == [5, 6, 7, *range(20, 40)]
    assert slots.blocks[0, :2].tolist() == [8, 0]
    assert slots.num_blocks.tolist() == [1, 0, 23, 0]


def test_opening_resets_everything(slots):
    slots.open(opening(1, [3, 4, 5], greedy=False, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=9, logprobs=2,
                       repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2, min_new_tokens=4,
                       stop_ids=(1,), banned_ids=(2,), bad_sequences=((3, 4),), logit_bias=((5, 1.0),),
                       output_logits='all', output_hidden='generation',
                       logits_processors=(lambda ids, x: x,)))  # fmt: skip
    slots.append(np.array([1]), np.array([0, 2]), np.array([8, 9]))
    assert slots.keeps_history[1] and slots.history[1, :3].tolist() == [3, 4, 5]
    slots.open(opening(1, [6], prompt_len=1))
    fresh = SlotTable(4, 64, 16, torch.device('cpu'))
    fresh.open(opening(1, [6], prompt_len=1))
    for name, value in vars(fresh).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(getattr(slots, name)[1], value[1]), name
    assert slots.num_blocks[1] == 0 and not slots.blocks[1].any()


def test_history_is_only_made_for_requests_that_need_it(slots):
    slots.open(opening(0, list(range(30))))
    assert slots.history.numel() == 0
    slots.open(opening(1, list(range(30)), presence_penalty=0.5))
    assert slots.history.shape[1] >= 31
    slots.open(opening(2, list(range(60)), frequency_penalty=0.5))
    assert slots.history[1, :30].tolist() == list(range(30)), 'growing keeps what was there'


@pytest.mark.parametrize('params', [{'temperature': 0.0}, {'top_k': 1}, {'greedy': True}])
def test_what_leaves_one_token_is_greedy(slots, params):
    slots.open(opening(0, [1], **({'greedy': False} | params)))
    assert slots.greedy[0] and slots.temperature[0] > 0


def test_seeds_use_all_64_bits(slots):
    for slot, seed in enumerate((0, 1 << 63, (1 << 64) - 1, -1)):
        slots.open(opening(slot, [1], seed=seed))
    assert slots.seed[:-1].tolist() == [0, 1 << 63, (1 << 64) - 1, (1 << 64) - 1]
