"""Sampling on a GPU draws what the reference draws, from the sorted list, from the search and from whole rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmdeploy.ops import sample as reference
from lmdeploy.ops.slots import CHANGES, NO_END, SamplingTables, sample_slots
from lmdeploy.ops.triton import sample
from tests.ops.triton.conftest import INTERPRETED

TILE = 128 if INTERPRETED else sample.TILE
VOCABS = (64, 200) if INTERPRETED else (5000, 151936)  # few of them: a GPU's kernels are compiled for each
ROWS = 10 if INTERPRETED else 32
HALF = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles that a small vocabulary fills, several programs per row, and a list that overflows."""
    if INTERPRETED:
        monkeypatch.setattr(sample, 'TILE', TILE)
        monkeypatch.setattr(sample, 'multiprocessors', lambda device: 2 * ROWS)
        monkeypatch.setattr(sample, 'SORTED', 128)
        monkeypatch.setattr(sample, 'LISTED', 128)
        monkeypatch.setattr(sample, 'SEARCH', 64)


def tables(slots: int, vocab: int, device, seed: int = 0, changes: bool = False, counted: bool = False,
           greedy: bool = False) -> SamplingTables:  # fmt: skip
    """Slots of every kind."""
    random = np.random.default_rng(seed)
    full, pick = slots + 1, random.choice

    def put(values, dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

    zeros, ones = np.zeros(full), np.ones(full)
    ids = np.full((full, CHANGES), -1)
    if changes:
        ids[::2, :6] = random.integers(0, vocab, (len(ids[::2]), 6))
        ids[::2, 5] = ids[::2, 4]  # the changes of one token add up
    values, until = np.zeros(ids.shape), np.full(ids.shape, NO_END)
    values[:, :6], until[:, 3] = [-np.inf, 3, -3, 9, 1, 2], 2
    seen = random.integers(0, 6, (full, vocab)) * (random.random((full, vocab)) < 0.2)
    return SamplingTables(
        last_token=put(zeros - 1, torch.int32),
        temperature=put(zeros if greedy else pick([0, 0.05, 0.6, 1.0, 2.0], full), torch.float32),
        top_k=put(pick([0, 0, 1, 5, 40, vocab, vocab + 7], full), torch.int32),
        top_p=put(pick([1.0, 1.0, 0.95, 0.5, 1e-6], full), torch.float32),
        min_p=put(pick([0.0, 0.0, 0.01, 0.3, 1.0], full), torch.float32),
        repetition=put(pick([1.0, 1.5, 0.7], full) if counted else ones, torch.float32),
        presence=put(pick([0.0, 0.5], full) if counted else zeros, torch.float32),
        frequency=put(pick([0.0, -0.3], full) if counted else zeros, torch.float32),
        has_penalty=put(np.arange(full) % 2 if counted else zeros, torch.int32),
        prompt_len=put(zeros + 3, torch.int32), seed=put(random.integers(-(1 << 63), 1 << 63, full), torch.int64),
        change_ids=put(ids, torch.int32), change_values=put(values, torch.float32),
        change_until=put(until, torch.int32), seen=put(seen if counted else seen[:, :0], torch.int16),
    )  # fmt: skip


def on(found: SamplingTables, device) -> SamplingTables:
    return SamplingTables(*(getattr(found, name).to(device, copy=True) for name in found.__slots__))


def logits_of(vocab: int, seed: int, scale: float, coarse: bool) -> torch.Tensor:
    logits = torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    if coarse:
        logits = (logits * 4).round() / 4
    logits[0, 1:] = float('-inf')
    logits[1] = 1.5
    logits[2, 5], logits[3], logits[4, 7], logits[5, 3] = float('nan'), float('-inf'), float('inf'), float('-inf')
    return logits


@pytest.mark.parametrize('vocab', VOCABS)
@pytest.mark.parametrize(('scale', 'coarse', 'counted', 'sizes'), [
    (3.0, True, True, None), (0.3, False, False, (4, 64)), *(
        [(3.0, False, False, None), (0.3, True, False, (4, 8))] if INTERPRETED else [])])
def test_slots(vocab, scale, coarse, counted, sizes, device, monkeypatch):
    """``sizes``: of the sorted and the unsorted list."""
    if sizes is not None:
        monkeypatch.setattr(sample, 'SORTED', sizes[0])
        monkeypatch.setattr(sample, 'LISTED', sizes[1])
    ours = tables(ROWS, vocab, device, vocab, counted, counted)
    theirs = on(ours, 'cpu')
    logits = logits_of(vocab, vocab + coarse, scale, coarse)
    generator = torch.Generator().manual_seed(vocab)
    slots = torch.randperm(ROWS, generator=generator).int()
    positions = torch.randint(2, 9, (ROWS,), generator=generator, dtype=torch.int32)
    wanted, wanted_status = sample_slots.reference(logits.clone(), slots, positions, theirs, False)
    found, status = sample.triton_sample_slots(logits.to(device), slots.to(device), positions.to(device), ours, False)
    assert torch.equal(status.cpu(), wanted_status)
    assert status.cpu()[2:6].tolist() == [1, 2, 1, 0]
    # exponentials differ in their last bit: one draw in some million may cross a border
    assert found.cpu().tolist() == wanted.tolist()
    assert torch.equal(ours.last_token.cpu(), theirs.last_token)
    assert torch.equal(ours.seen.cpu(), theirs.seen)


@pytest.mark.parametrize('vocab', VOCABS)
@pytest.mark.parametrize('dtype_', [torch.float32, HALF], ids=str)
def test_greedy_rows(vocab, dtype_, device):
    ours = tables(ROWS, vocab, device, greedy=True)
    logits = logits_of(vocab, 1, 2.0, True).to(dtype_)
    logits[6, [1, 9]], logits[7] = 100.0, -0.0
    logits[7, 3] = 0.0  # both zeros are equal: the first wins
    slots = torch.arange(ROWS - 1, -1, -1, dtype=torch.int32)
    found, status = sample.triton_sample_slots(logits.to(device), slots.to(device), slots.to(device), ours, True)
    wanted, wanted_status = sample_slots.reference(logits, slots, slots, on(ours, 'cpu'), True)
    assert torch.equal(status.cpu(), wanted_status) and torch.equal(found.cpu(), wanted)
    assert torch.equal(ours.last_token.cpu()[slots.long()], wanted)
    good = wanted_status == 0
    assert torch.equal(sample.triton_greedy(logits.to(device)).cpu()[good], logits.float().argmax(-1)[good])


def test_rows_do_not_depend_on_their_neighbours(device):
    vocab = VOCABS[-1]
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0)).to(device) * 2
    slots, positions = torch.arange(6, device=device).int(), torch.arange(3, 9, device=device).int()
    whole = sample.triton_sample_slots(logits.clone(), slots, positions, tables(6, vocab, device), False)[0]
    for i in range(6):
        alone = logits[i : i + 1].clone(), slots[i : i + 1], positions[i : i + 1], tables(6, vocab, device), False
        assert sample.triton_sample_slots(*alone)[0] == whole[i]


# the last of many tokens is lighter than the last bit of the sum of all: which one the end means, rounding decides
@pytest.mark.parametrize(('vocab', 'points'), [(VOCABS[0], (0.37,)), (64, (0.37, 1 - 2**-53))])
def test_given_numbers(vocab, points, device):
    """``draw`` walks over the whole distribution."""
    random = np.random.default_rng(0)
    logits = torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(3)) * 2
    given = (
        torch.from_numpy(random.choice([0.3, 1.0, 2.0], ROWS).astype(np.float32)),
        torch.from_numpy(random.choice([0, 3, 50], ROWS)), torch.from_numpy(random.choice([1.0, 0.9, 0.4], ROWS)),
        torch.from_numpy(random.choice([0.0, 0.05], ROWS).astype(np.float32)),
    )  # fmt: skip
    for point in points:
        numbers = torch.full((ROWS,), point, dtype=torch.float64)
        found = sample.triton_draw(logits.to(device), *(t.to(device) for t in given), numbers.to(device))
        assert torch.equal(found.cpu(), reference.draw.reference(logits, *given, numbers)), point


def test_counts_stop_where_their_type_ends(device):
    ours = tables(1, 64, device, greedy=True, counted=True)
    ours.has_penalty[:] = 1
    ours.presence[:], ours.frequency[:], ours.repetition[:] = 0.0, 0.0, 1.0
    ours.seen[0, 9], logits = 32766, torch.zeros(1, 64, device=device)
    logits[0, 9] = 3.0
    at = torch.zeros(1, dtype=torch.int32, device=device)
    assert sample.triton_sample_slots(logits, at, at, ours, False)[0].item() == 9
    assert ours.seen[0, 9].item() == 32766
