"""Changes to logits, each against a loop over single tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmdeploy.ops import logits as reference
from lmdeploy.ops.cpu import logits as cpu

VOCAB = 70


@pytest.fixture
def logits():
    return torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize('contain', [reference.contain_non_finite.reference, cpu.contain_non_finite])
@pytest.mark.parametrize('poison', [float('nan'), float('inf'), float('-inf')])
def test_only_poisoned_rows_are_contained(logits, contain, poison):
    before = logits.clone()
    logits[2, 5] = poison
    assert contain(logits).tolist() == [True, True, False, True]
    assert torch.equal(logits[[0, 1, 3]], before[[0, 1, 3]])
    assert not logits[2].any()


def test_both_infinities_in_one_row_are_seen(logits):
    logits[1, 3], logits[1, 4] = float('inf'), float('-inf')
    assert reference.contain_non_finite(logits).tolist() == [True, False, True, True]


def test_masks_ban_the_clear_bits_of_their_rows(logits):
    before = logits.clone()
    allowed = np.random.default_rng(0).random((2, VOCAB)) < 0.4
    bits = np.zeros((2, 96), bool)
    bits[:, :VOCAB] = allowed
    masks = np.packbits(bits, axis=1, bitorder='little').view(np.int32)
    reference.apply_masks(logits, torch.tensor([3, 1]), torch.from_numpy(masks))
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    for row, keep in zip((3, 1), allowed):
        assert torch.equal(logits[row], before[row].masked_fill(~torch.from_numpy(keep), float('-inf')))


def test_an_empty_mask_leaves_a_row_dead(logits):
    reference.apply_masks(logits, torch.tensor([2]), torch.zeros(1, 3, dtype=torch.int32))
    assert reference.live_rows(logits).tolist() == [True, True, False, True]


def test_additions_of_one_token_accumulate(logits):
    before = logits.clone()
    reference.add_at(logits, torch.tensor([0, 0, 3]), torch.tensor([7, 7, 0]), torch.tensor([1.0, 2.0, float('-inf')]))
    assert logits[0, 7] == before[0, 7] + 1.0 + 2.0
    assert logits[3, 0] == float('-inf')
    assert (logits != before).sum() == 2


def test_repetition_counts_a_token_once(logits):
    before = logits.clone()
    seen = torch.tensor([[3, 9, 3, 69], [1, 1, 1, 1]])
    reference.penalise_repetition(logits, torch.tensor([2, 0]), seen, torch.tensor([1.7, 0.5]))
    for row, tokens, penalty in ((2, {3, 9, 69}, 1.7), (0, {1}, 0.5)):
        for token in range(VOCAB):
            x = before[row, token]
            wanted = (x * penalty if x < 0 else x / penalty) if token in tokens else x
            torch.testing.assert_close(logits[row, token], wanted)
    assert torch.equal(logits[[1, 3]], before[[1, 3]])


def test_presence_counts_a_token_once_and_frequency_every_time(logits):
    before = logits.clone()
    seen = torch.tensor([[3, 9, 3, 3], [5, 6, 6, 6]])
    rows, penalty = torch.tensor([2, 0]), torch.tensor([0.7, -1.5])
    reference.penalise_presence(logits, rows, seen, penalty)
    torch.testing.assert_close(before[2, 3] - logits[2, 3], torch.tensor(0.7))
    torch.testing.assert_close(before[0, 6] - logits[0, 6], torch.tensor(-1.5))
    assert (logits != before).sum() == 4
    logits.copy_(before)
    reference.penalise_frequency(logits, rows, seen, torch.tensor([4, 2]), penalty)
    torch.testing.assert_close(before[2, 3] - logits[2, 3], torch.tensor(2.1))
    torch.testing.assert_close(before[0, 6] - logits[0, 6], torch.tensor(-1.5))  # its last two are beyond the count
    assert (logits != before).sum() == 4


def test_normaliser_is_the_log_of_the_sum_and_the_same_alone(logits):
    for vocab in (1, 63, 64, VOCAB):
        part = logits[:, :vocab].contiguous()
        got = reference.log_normaliser(part)
        torch.testing.assert_close(got, part.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
        assert torch.equal(got, torch.cat([reference.log_normaliser(part[i:i + 1]) for i in range(4)]))
