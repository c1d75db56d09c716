"""The head's best logits keep float32 precision where the weights are 16 bits wide."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.nn.embedding import CANDIDATES, sharpen

ROWS, VOCAB, HIDDEN = 9, 1000, 96


@pytest.fixture
def product():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCAB, HIDDEN, generator=generator).to(torch.bfloat16)
    table[VOCAB // 2:] = table[:VOCAB // 2]
    table[VOCAB // 2:, 0] *= 1.02  # every logit has a twin that is hard to tell from it
    hidden = (2 * torch.randn(ROWS, HIDDEN, generator=generator)).to(torch.bfloat16)
    return hidden, table, hidden.double() @ table.double().T


def rows_of(table):
    return lambda ids: table[ids].float()


def test_the_best_are_right_and_the_others_as_they_were(product):
    hidden, table, exact = product
    rounded = exact.to(torch.bfloat16).float()
    logits = sharpen(rounded.clone(), hidden, rows_of(table))
    changed = logits != rounded
    assert (changed.sum(1) <= CANDIDATES).all()
    best = exact.topk(20, dim=1).indices
    torch.testing.assert_close(logits.gather(1, best).double(), exact.gather(1, best), rtol=1e-6, atol=1e-5)
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    assert not torch.equal(rounded.argmax(1), exact.argmax(1))  # else the test shows nothing


def test_a_row_does_not_depend_on_its_neighbours(product):
    hidden, table, exact = product
    rounded = exact.to(torch.bfloat16).float()
    together = sharpen(rounded.clone(), hidden, rows_of(table))
    for i in range(ROWS):
        assert torch.equal(sharpen(rounded[i:i + 1].clone(), hidden[i:i + 1], rows_of(table)), together[i:i + 1])
        assert torch.equal(sharpen(rounded[i:].clone(), hidden[i:], rows_of(table)), together[i:])


def test_a_small_vocabulary_is_right_throughout(product):
    hidden, table, exact = product
    logits = sharpen(torch.zeros(ROWS, 8), hidden, rows_of(table[:8]))
    torch.testing.assert_close(logits.double(), exact[:, :8], rtol=1e-6, atol=1e-5)
