"""The best tokens and the normaliser against their references."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.logits import log_normaliser
from lmdeploy.ops.sample import ranked
from lmdeploy.ops.triton import logits as kernels
from tests.ops.triton.conftest import INTERPRETED

VOCABS = (40, 300) if INTERPRETED else (40, 5000, 151936)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(kernels, '_TILE', 64)


def rows(vocab: int, coarse: bool) -> torch.Tensor:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    if coarse:
        logits = logits.round()
    logits[1, 3:], logits[2] = float('-inf'), -7.0
    logits[3, [5, 2]] = torch.tensor([0.0, -0.0])
    return logits


@pytest.mark.parametrize('vocab', VOCABS)
@pytest.mark.parametrize('coarse', [False, True])
def test_the_best(vocab, coarse, device):
    logits = rows(vocab, coarse)
    for k in (20,) if INTERPRETED else (1, 20, kernels.MOST):
        for found, wanted in zip(kernels.triton_ranked(logits.to(device), k), ranked.reference(logits, k), strict=True):
            assert torch.equal(found.cpu(), wanted), k
    assert kernels.triton_ranked(logits[:0].to(device), 3)[1].shape == (0, 3)


@pytest.mark.parametrize('vocab', VOCABS)
def test_the_normaliser(vocab, device):
    logits = rows(vocab, False)
    found = kernels.triton_log_normaliser(logits.to(device))
    assert found.dtype is torch.float64
    torch.testing.assert_close(found.cpu(), log_normaliser.reference(logits), rtol=1e-6, atol=1e-6)
    for i in range(len(logits)):
        assert torch.equal(kernels.triton_log_normaliser(logits[i : i + 1].to(device)), found[i : i + 1])
