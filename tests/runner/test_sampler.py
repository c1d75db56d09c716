"""Laws of the sampler: the order of changes, containment of bad rows, independence of rows, drafts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine.plan import DEAD_MASK, NON_FINITE, OK, PROCESSOR_FAILED
from lmdeploy.runner.sampler import Sampler, Sites
from lmdeploy.runner.slots import SlotTable
from tests.runner.plans import opening

VOCAB = 50
INF = float('inf')


def make(*requests, slots=8):
    table = SlotTable(slots, 256, 16, torch.device('cpu'))
    for request in requests:
        table.open(request)
    return Sampler(table)


def decoding(*requests, masks=None):
    """The sites of requests whose last known token has just been computed."""
    positions = [len(request.tokens) - 1 for request in requests]
    packed = masks and np.stack([pack(mask) for mask in masks.values()])
    count, slots = len(requests), [request.slot for request in requests]
    return Sites(np.arange(count), np.array(slots, np.int64), np.array(positions, np.int64), np.arange(count + 1),
                 np.full(count, -1), np.array(list(masks), np.int64) if masks else None, packed)  # fmt: skip


def pack(allowed) -> np.ndarray:
    bits = np.zeros(-(-VOCAB // 32) * 32, bool)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder='little').view(np.int32)


def random_logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def plain_change(logits, request, mask=None):
    """The documented order of changes, one token at a time."""
    p, tokens = request.params, request.tokens.tolist()
    generated = tokens[request.prompt_len:]
    x = [float(v) for v in logits]
    if mask is not None:
        x = [v if i in mask else -INF for i, v in enumerate(x)]
    for token, value in p.logit_bias:
        x[token] += value
    for token in set(tokens):
        if p.repetition_penalty != 1.0:
            x[token] = x[token] * p.repetition_penalty if x[token] < 0 else x[token] / p.repetition_penalty
    for token in set(generated):
        x[token] -= p.presence_penalty + p.frequency_penalty * generated.count(token)
    banned = set(p.banned_ids) | (set(p.stop_ids) if len(generated) < p.min_new_tokens else set())
    for sequence in p.bad_sequences:
        head = list(sequence[:-1])
        if len(head) <= len(tokens) and tokens[len(tokens) - len(head):] == head:
            banned.add(sequence[-1])
    return torch.tensor([-INF if i in banned else v for i, v in enumerate(x)])


requests = st.builds(
    lambda tokens, prompt, **params: ([*tokens], min(prompt, len(tokens)), params),
    st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 20),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]), presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]), min_new_tokens=st.integers(0, 8),
    stop_ids=st.sampled_from([(), (3,), (3, 40)]), banned_ids=st.sampled_from([(), (0, 7)]),
    bad_sequences=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    logit_bias=st.sampled_from([(), ((2, 4.0), (9, -100.0))]),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, min_size=1, max_size=5), st.integers(0, 1000), st.booleans())
def test_changes_are_those_of_a_loop_over_tokens(given_requests, seed, masked):
    opened = [opening(slot, tokens, prompt, **params) for slot, (tokens, prompt, params) in enumerate(given_requests)]
    sampler, logits = make(*opened), random_logits(len(opened), seed)
    mask = set(range(0, VOCAB, 3)) if masked else None
    wanted = [plain_change(row, request, None if request.slot else mask) for row, request in zip(logits, opened)]
    changed = logits.clone()
    sampler._change(changed, decoding(*opened, masks={0: mask} if masked else None), {})
    torch.testing.assert_close(changed, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    drawn = sampler(logits.clone(), decoding(*opened, masks={0: mask} if masked else None))
    assert drawn.tokens.tolist() == changed.argmax(-1).tolist()


def test_a_request_draws_the_same_tokens_whatever_else_is_in_the_batch():
    generator = np.random.default_rng(0)
    options = [{'greedy': False, 'temperature': 0.7, 'top_k': 20, 'top_p': 0.9, 'seed': 1},
               {'greedy': False, 'temperature': 1.3, 'seed': 2, 'repetition_penalty': 1.2},
               {'greedy': True, 'frequency_penalty': 0.3}, {'greedy': False, 'min_p': 0.05, 'seed': 3}]  # fmt: skip
    alone = []
    for step in range(12):  # every request by itself
        row = []
        for slot, params in enumerate(options):
            tokens = [1, 2, 3, *(a[slot] for a in alone)]
            request = opening(slot, tokens, 3, **params)
            row.append(make(request)(random_logits(4, step)[slot:slot + 1], decoding(request)).tokens.item())
        alone.append(row)
    sampler = make(*(opening(slot, [1, 2, 3], 3, **params) for slot, params in enumerate(options)))
    for step in range(12):  # all together, in any order, with the slots' own memory of what was drawn
        order = generator.permutation(4)
        sites = Sites(np.arange(4), order.astype(np.int64), np.full(4, 2 + step), np.arange(5), np.full(4, -1))
        drawn = sampler(random_logits(4, step)[order], sites)
        assert drawn.tokens.tolist() == [alone[step][slot] for slot in order]
        assert sampler.slots.last_token[:4].tolist() == alone[step]


@pytest.mark.parametrize('poison', [float('nan'), INF, -INF])
def test_a_row_that_is_not_finite_fails_alone(poison):
    requests = [opening(slot, [1], greedy=slot < 2, seed=slot) for slot in range(4)]
    clean = make(*requests)(random_logits(4), decoding(*requests))
    logits = random_logits(4)
    logits[1, 7], logits[2, 8] = poison, poison
    drawn = make(*requests)(logits, decoding(*requests))
    assert drawn.status.tolist() == [OK, NON_FINITE, NON_FINITE, OK]
    assert drawn.accepted.tolist() == [1, 0, 0, 1]
    assert drawn.tokens[[0, 3]].tolist() == clean.tokens[[0, 3]].tolist()


def test_a_row_with_nothing_allowed_fails_alone():
    requests = [opening(0, [1]), opening(1, [1]), opening(2, [1], banned_ids=tuple(range(VOCAB))), opening(3, [1])]
    drawn = make(*requests)(random_logits(4), decoding(*requests, masks={1: set(), 3: {17}}))
    assert drawn.status.tolist() == [OK, DEAD_MASK, DEAD_MASK, OK]
    assert drawn.accepted.tolist() == [1, 0, 0, 1]
    assert drawn.tokens[3] == 17


def test_logits_processors_see_all_tokens_and_are_chained():
    seen = []

    def record(token_ids, logits):
        seen.append((token_ids.tolist(), logits.shape))
        return logits + torch.nn.functional.one_hot(torch.tensor(11), VOCAB) * 100

    def forbid(token_ids, logits):
        logits[11] = -INF  # in place is allowed
        logits[12] = 99
        return logits

    request = opening(0, [4, 5, 6], 2, logits_processors=(record, forbid))
    sampler = make(request, opening(1, [1]))
    drawn = sampler(random_logits(2), decoding(request, opening(1, [1])))
    assert drawn.tokens[0] == 12 and drawn.status.tolist() == [OK, OK]
    sampler(random_logits(1), Sites(np.array([0]), np.array([0]), np.array([3]), np.arange(2), np.array([-1])))
    assert seen == [([4, 5, 6], (VOCAB,)), ([4, 5, 6, 12], (VOCAB,))]


def raising(ids, logits):
    raise KeyError('mine')


@pytest.mark.parametrize(('processor', 'told'), [
    (raising, "raising raised KeyError: 'mine'"),
    (lambda ids, x: None, 'must return a tensor'),
    (lambda ids, x: x[:3], 'must return a tensor'),
    (lambda ids, x: x * float('nan'), 'NaN'),
    (lambda ids, x: x + INF, 'NaN or +inf'),
])  # fmt: skip
def test_a_failing_processor_fails_its_own_row(processor, told):
    requests = [opening(0, [1]), opening(1, [1], logits_processors=(processor,)), opening(2, [1])]
    clean = random_logits(3)
    drawn = make(*requests)(clean.clone(), decoding(*requests))
    assert drawn.status.tolist() == [OK, PROCESSOR_FAILED, OK]
    assert told in drawn.errors[1]
    assert drawn.tokens[[0, 2]].tolist() == clean[[0, 2]].argmax(-1).tolist()


def test_a_processor_that_bans_everything_leaves_a_dead_row():
    request = opening(0, [1], logits_processors=(lambda ids, x: torch.full_like(x, -INF),))
    assert make(request)(random_logits(1), decoding(request)).status.tolist() == [DEAD_MASK]


def test_logprobs_are_the_models_own():
    requests = [opening(0, [1], logprobs=3, banned_ids=(5,), temperature=0.3, greedy=False, seed=4), opening(1, [1]),
                opening(2, [1], logprobs=0), opening(3, [1], logprobs=VOCAB)]  # fmt: skip
    logits = random_logits(4)
    logits[0, 5] = 50.0  # the model's favourite is banned, and reported all the same
    wanted = logits.log_softmax(-1)
    drawn = make(*requests)(logits.clone(), decoding(*requests))
    report = drawn.logprobs
    assert report.sites.tolist() == [0, 2, 3] and report.wanted.tolist() == [3, 0, VOCAB]
    torch.testing.assert_close(report.chosen, wanted[[0, 2, 3]].gather(-1, drawn.tokens[[0, 2, 3], None]).squeeze(-1))
    values, ids = wanted[[0, 2, 3]].sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(report.values, values)
    assert torch.equal(report.ids, ids.int()) and report.ids[0, 0] == 5


# -- drafts: a row of several sites ------------------------------------------------------------------------------------


def drafted(request, drafts):
    """One row that verifies ``drafts`` after the request's known tokens."""
    count = len(drafts) + 1
    first = len(request.tokens) - 1
    return Sites(np.array([0]), np.full(count, request.slot), np.arange(first, first + count), np.array([0, count]),
                 np.array([*drafts, -1], np.int64))  # fmt: skip


@pytest.mark.parametrize('params', [
    {}, {'greedy': False, 'temperature': 0.8, 'top_k': 10, 'seed': 5},
    {'greedy': False, 'seed': 6, 'repetition_penalty': 1.5, 'frequency_penalty': 0.5,
     'bad_sequences': ((3, 4), (1, 2, 9))},
])  # fmt: skip
@pytest.mark.parametrize('right', [0, 1, 2, 3])
def test_verified_drafts_are_the_tokens_of_one_step_at_a_time(params, right):
    """Logits depend on the tokens before them here, as a model's do."""

    def model(tokens):
        return random_logits(1, seed=hash(tuple(tokens)) % 10**6)

    tokens = [1, 2, 3]
    for _ in range(4):  # without drafts
        request = opening(0, tokens, 3, **params)
        tokens = [*tokens, make(request)(model(tokens), decoding(request)).tokens.item()]
    drafts = tokens[3:6]
    if right < 3:
        drafts[right] = (drafts[right] + 1) % VOCAB
    request = opening(0, [1, 2, 3], 3, **params)
    sampler = make(request)
    logits = torch.cat([model([1, 2, 3, *drafts[:n]]) for n in range(4)])
    drawn = sampler(logits, drafted(request, drafts))
    assert drawn.accepted.tolist() == [right + 1] and drawn.status.tolist() == [OK]
    assert drawn.tokens[:right + 1].tolist() == tokens[3:4 + right]
    assert sampler.slots.last_token[0] == tokens[3 + right]
    if sampler.slots.keeps_history[0]:
        assert sampler.slots.history[0, :4 + right].tolist() == tokens[:4 + right]


def test_rows_with_and_without_drafts_share_a_step_and_a_bad_site_counts_only_if_reached():
    requests = [opening(0, [1]), opening(1, [1]), opening(2, [1]), opening(3, [1])]
    logits = random_logits(8)
    best = logits.argmax(-1).tolist()
    # row 0: no draft; row 1: right, wrong; row 2: right, then not finite; row 3: wrong, then not finite
    drafts = [-1, best[1], (best[2] + 1) % VOCAB, -1, best[4], -1, (best[6] + 1) % VOCAB, -1]
    logits[5, 0] = logits[7, 0] = float('nan')
    slots, positions = np.array([0, 1, 1, 1, 2, 2, 3, 3]), np.array([0, 0, 1, 2, 0, 1, 0, 1])
    sites = Sites(np.arange(4), slots, positions, np.array([0, 1, 4, 6, 8]), np.array(drafts, np.int64))
    sampler = make(*requests)
    drawn = sampler(logits, sites)
    assert drawn.accepted.tolist() == [1, 2, 1, 1]
    assert drawn.status.tolist() == [OK, OK, NON_FINITE, OK]
    assert sampler.slots.last_token[:4].tolist() == [best[0], best[2], best[4], best[6]]


def test_frequencies_over_a_stream_of_draws_match_the_softmax():
    """Chi-square over one request's 6,000 draws, 49 degrees of freedom: 85.4 is the 0.1 % point."""
    request = opening(0, [1], greedy=False, seed=12)
    sampler, logits = make(request), random_logits(1) / 3
    sites = Sites(np.arange(6000), np.zeros(6000, np.int64), np.arange(6000), np.arange(6001), np.full(6000, -1))
    draws = sampler(logits.repeat(6000, 1), sites).tokens
    wanted = logits[0].softmax(-1) * 6000
    counts = torch.bincount(draws, minlength=VOCAB)
    assert ((counts - wanted) ** 2 / wanted).sum() < 85.4
    assert math.isclose(wanted.sum(), 6000, rel_tol=1e-4)
