"""Laws of drawing: the reference against a plain loop, the CPU implementation against the reference, exactly."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.ops import sample as reference
from lmdeploy.ops.cpu import sample as cpu

oracle = SimpleNamespace(**{name: getattr(reference, name).reference for name in ('greedy', 'ranked', 'draw')})
IMPLEMENTATIONS = [pytest.param(oracle, id='reference'), pytest.param(cpu, id='cpu')]


def plain_keep(logits, temperature, top_k, top_p, min_p) -> list[tuple[int, float]]:
    """(token, weight) of the tokens that the three cuts leave, in the order in which they are drawn."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = logits[order[0]]
    weight = [math.exp((x - best) / temperature) for x in logits]
    cut = 0 < top_k < len(logits) or top_p < 1 or min_p > 0
    if not cut:
        return list(enumerate(weight))
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if top_p < 1 and mass >= top_p * total:
            break
        mass += weight[i]
        kept.append(i)
    return [(i, weight[i]) for i in kept if weight[i] >= min_p]


def arguments(rows: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, first_draw=0):
    full = torch.full
    draws = np.arange(first_draw, first_draw + rows)
    return (full((rows,), temperature), full((rows,), top_k), full((rows,), top_p, dtype=torch.float64),
            full((rows,), min_p), torch.from_numpy(reference.uniforms(np.full(rows, seed, np.uint64), draws)))


def mixed_arguments(rows: int, vocab: int, generator: np.random.Generator):
    """Rows of every kind: cut and uncut, each with its own numbers."""
    pick = generator.choice
    return (
        torch.from_numpy(pick([0.05, 0.6, 1.0, 2.0], rows).astype(np.float32)),
        torch.from_numpy(pick([0, 0, 1, 5, 40, 64, 100, vocab, vocab + 7], rows).astype(np.int64)),
        torch.from_numpy(pick([1.0, 1.0, 0.95, 0.5, 1e-6], rows)),
        torch.from_numpy(pick([0.0, 0.0, 0.01, 0.3, 1.0], rows).astype(np.float32)),
        torch.from_numpy(reference.uniforms(generator.integers(0, 1 << 63, rows).astype(np.uint64), np.arange(rows))),
    )


@pytest.mark.parametrize('ops', IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.3, 1.0, 2.0]),
       top_k=st.sampled_from([0, 1, 3, 9, 50]), top_p=st.sampled_from([1.0, 0.9, 0.4, 0.01]),
       min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]), ties=st.booleans())
def test_only_kept_tokens_are_drawn_and_each_by_its_share(ops, seed, temperature, top_k, top_p, min_p, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 20, generator=generator) * 2
    if ties:
        logits = logits.round()
    kept = plain_keep(logits[0].tolist(), temperature, top_k, top_p, min_p)
    # the draw inverts the cumulative distribution: walk it at 400 evenly spaced points
    points = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    options = arguments(400, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = ops.draw(logits.expand(400, -1), *options[:4], points)
    total = sum(weight for _, weight in kept)
    counts = torch.bincount(drawn, minlength=20)
    assert set(drawn.tolist()) <= {token for token, _ in kept}
    for token, weight in kept:
        assert abs(counts[token].item() - 400 * weight / total) <= 1.01


@pytest.mark.parametrize('vocab', [5, 64, 100, 1000, 4097, 32000])
@pytest.mark.parametrize('coarse', [False, True])
def test_cpu_draws_exactly_what_the_reference_draws(vocab, coarse):
    generator = np.random.default_rng(vocab)
    rows = 48 if vocab <= 4097 else 16
    logits = torch.from_numpy(generator.standard_normal((rows, vocab)).astype(np.float32)) * 3
    if coarse:  # what a bfloat16 head gives: many ties
        logits = logits.bfloat16().float()
    logits[0, 1:] = float('-inf')
    logits[1] = 1.5
    options = mixed_arguments(rows, vocab, generator)
    assert torch.equal(cpu.draw(logits, *options), oracle.draw(logits, *options))
    assert torch.equal(cpu.greedy(logits), oracle.greedy(logits))
    for k in {0, 1, min(20, vocab), min(63, vocab), min(64, vocab), min(1024, vocab)}:
        for got, wanted in zip(cpu.ranked(logits, k), oracle.ranked(logits, k)):
            assert torch.equal(got, wanted), k


def test_a_row_draws_the_same_alone_and_in_any_batch():
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(generator.standard_normal((24, 5000)).astype(np.float32)) * 2
    options = mixed_arguments(24, 5000, generator)
    together = cpu.draw(logits, *options)
    alone = [cpu.draw(logits[i:i + 1], *(o[i:i + 1] for o in options)) for i in range(24)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize('ops', IMPLEMENTATIONS)
def test_frequencies_match_the_softmax(ops):
    """Chi-square over 20,000 draws of one seed's stream, 15 degrees of freedom: 37.7 is the 0.1 % point."""
    logits = torch.linspace(-1.5, 1.5, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    drawn = ops.draw(logits.expand(20000, -1), *arguments(20000, seed=7))
    wanted = logits.softmax(-1) * 20000
    chi = ((torch.bincount(drawn, minlength=16) - wanted) ** 2 / wanted).sum()
    assert chi < 37.7


def test_streams_of_different_seeds_and_draws_are_uniform_and_unrelated():
    for numbers in (reference.uniforms(np.full(20000, 3, np.uint64), np.arange(20000)),
                    reference.uniforms(np.arange(20000).astype(np.uint64), np.zeros(20000, int))):
        assert ((numbers >= 0) & (numbers < 1)).all()
        counts = np.bincount((numbers * 64).astype(int), minlength=64)
        assert ((counts - 312.5) ** 2 / 312.5).sum() < 103.4  # 63 degrees of freedom, 0.1 %
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    seeds = np.array([0, (1 << 64) - 1, 1 << 63], np.uint64)
    assert len(set(reference.uniforms(seeds, np.zeros(3, int)).tolist())) == 3


@pytest.mark.parametrize('ops', IMPLEMENTATIONS)
@pytest.mark.parametrize('uniform', [0.0, 1 - 2.0**-53])
def test_ends_of_the_unit_interval_never_draw_a_banned_token(ops, uniform):
    logits = torch.tensor([[float('-inf'), 0.0, float('-inf'), -80.0, float('-inf')]] * 2)
    ends = torch.full((2,), uniform, dtype=torch.float64)
    for cuts in ({}, {'top_k': 4}, {'top_p': 0.999999}, {'min_p': 1e-30}):
        assert set(ops.draw(logits, *arguments(2, **cuts)[:4], ends).tolist()) <= {1, 3}


@pytest.mark.parametrize('ops', IMPLEMENTATIONS)
def test_a_tiny_temperature_is_greedy(ops):
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ops.draw(logits, *arguments(8, temperature=1e-30)), logits.argmax(-1))
