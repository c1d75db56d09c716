"""The last kernel of sampling: one program per row inverts the cumulative distribution of what the row's cuts leave.

A row that cuts nothing off needs one tile: the sums of the tiles say which. A row with cuts has its candidates in a
list of at most ``MOST``, which is sorted here; what follows is the reference's arithmetic. A flat distribution leaves
more: then the borders are found by halving the range of a logit's 32 bits, each time over the whole row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.ops.slots import GENERATED, MOST_SEEN
from lmdeploy.ops.triton.launch import gdc_launch_dependents, gdc_wait

DONE, DRAW_WHOLE, DRAW_CUT = 0, 1, 2  # what is left to do for a row
BINS = 256  # of distances from the best, in steps of 1/8; the last holds all that is farther
MOST = 1024  # candidates that are sorted
_WHOLE = tl.constexpr(DRAW_WHOLE)
_GENERATED, _MOST_SEEN = tl.constexpr(GENERATED), tl.constexpr(MOST_SEEN)


@triton.jit
def steps_below(scaled, BINS: tl.constexpr):
    """The bin of tokens whose logits over temperature are ``scaled`` (at most 0) above the best's."""
    return tl.minimum(scaled * -8.0, BINS - 1.0).to(tl.int32)


@triton.jit
def _goal(uniform, mass):
    """The share ``uniform`` of ``mass``, below it."""
    below = (mass.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    return tl.minimum(uniform * mass, below)


@triton.jit
def _draw_whole(base, masses, best, heat, uniform, vocab, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    places = tl.arange(0, TILES)
    mass = tl.load(masses + places, mask=places < tiles, other=0.0)
    upto = tl.cumsum(mass, 0)
    goal = _goal(uniform, tl.max(upto, 0))
    tile = tl.minimum(tl.sum((upto <= goal).to(tl.int32), 0), tiles - 1)
    before = tl.sum(tl.where(places == tile, upto - mass, 0.0), 0)
    at = tile * TILE + tl.arange(0, TILE)
    x = tl.load(base + at, mask=at < vocab, other=float('-inf')).to(tl.float32)
    weight = tl.exp(tl.div_rn(x - best, heat))
    sums = before + tl.cumsum(weight.to(tl.float64), 0)
    # rounding may leave no sum above the goal: the last token of any weight then
    passed = tl.min(tl.where((sums > goal) & (weight > 0), at, 0x7FFFFFFF), 0)
    return tl.minimum(passed, tl.max(tl.where(weight > 0, at, -1), 0))


@triton.jit
def _draw_sorted(ranked, number, whole, best, heat, k, p, share, uniform, vocab, SIZE: tl.constexpr):
    """``whole``: mass of all tokens, where top-k is off."""
    places = tl.arange(0, SIZE)
    ranks = tl.sort(tl.load(ranked + places, mask=places < number, other=0), descending=True)
    ids = (0x7FFFFFFF - (ranks & 0x7FFFFFFF)).to(tl.int32)
    key = ((ranks >> 31) - 0x80000000).to(tl.int32)
    x = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    weight = tl.where(places < number, tl.exp(tl.div_rn(x - best, heat)), 0.0)
    sums = tl.cumsum(weight.to(tl.float64), 0)
    limit = number
    total = whole
    if (k > 0) & (k < vocab):
        limit = tl.minimum(k.to(tl.int32), number)
        total = tl.sum(tl.where(places == limit - 1, sums, 0.0), 0)
    kept = limit
    if p < 1:
        kept = tl.minimum(kept, tl.sum(((sums < p * total) & (places < number)).to(tl.int32), 0) + 1)
    kept = tl.minimum(kept, tl.sum(((weight >= share) & (places < number)).to(tl.int32), 0))
    kept = tl.maximum(kept, 1)
    goal = _goal(uniform, tl.sum(tl.where(places == kept - 1, sums, 0.0), 0))
    place = tl.minimum(tl.sum(((sums <= goal) & (places < kept)).to(tl.int32), 0), kept - 1)
    return tl.sum(tl.where(places == place, ids, 0), 0)


@triton.jit
def _keys(x):
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(base, key, best, heat, vocab, TILE: tl.constexpr):
    """How many tokens have keys of at least ``key``, and their mass."""
    count = tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.float64)
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(base + at, mask=at < vocab, other=float('-inf')).to(tl.float32)
        taken = (at < vocab) & (_keys(x) >= key)
        count += taken.to(tl.int32)
        mass += tl.where(taken, tl.exp(tl.div_rn(x - best, heat)), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _border(base, count_goal, mass_goal, best, heat, vocab, BY_MASS: tl.constexpr, PASS: tl.constexpr,
            TILE: tl.constexpr):  # fmt: skip
    """Where the ranking reaches a goal: ``(key, count and mass above the key, weight of a token of this key)``.

    The goal is ``count_goal`` tokens or a mass of ``mass_goal`` (reached or, with ``PASS``, passed): the largest key at
    which the tokens of at least this key reach it.
    """
    low = tl.full((), -0x80000000, tl.int64)
    high = _keys(best).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        count, mass = _above(base, middle.to(tl.int32), best, heat, vocab, TILE)
        if BY_MASS:
            reached = (mass > mass_goal) if PASS else (mass >= mass_goal)
        else:
            reached = count >= count_goal
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    count, mass = _above(base, (low + 1).to(tl.int32), best, heat, vocab, TILE)
    bits = low.to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return low, count, mass, tl.exp(tl.div_rn(value - best, heat)).to(tl.float64)


@triton.jit
def _draw_searched(base, whole, best, heat, k, p, share, uniform, vocab, TILE: tl.constexpr):
    """The kept prefix ends at rank ``kept``; the draw's place in it is found in the same way."""
    kept = vocab
    total = whole
    if (k > 0) & (k < vocab):
        kept = k.to(tl.int32)
        _, count, mass, weight = _border(base, kept, whole, best, heat, vocab, False, False, TILE)
        total = mass + (kept - count).to(tl.float64) * weight
    kept_mass = total
    if p < 1:
        _, count, mass, weight = _border(base, 0, p * total, best, heat, vocab, True, False, TILE)
        more = tl.maximum(tl.ceil((p * total - mass) / weight), 1.0)
        if count + more.to(tl.int32) < kept:
            kept = count + more.to(tl.int32)
            kept_mass = mass + more * weight
    if share > 0:
        count, mass = _heavy(base, share, best, heat, vocab, TILE)
        if count < kept:
            kept = count
            kept_mass = mass
    goal = _goal(uniform, kept_mass)
    key, count, mass, weight = _border(base, 0, goal, best, heat, vocab, True, True, TILE)
    ordinal = tl.minimum(tl.maximum(tl.floor((goal - mass) / weight), 0.0).to(tl.int32), kept - 1 - count)
    return _nth(base, key.to(tl.int32), ordinal, vocab, TILE)


@triton.jit
def _heavy(base, share, best, heat, vocab, TILE: tl.constexpr):
    """Count and mass of the tokens with weights of at least ``share``."""
    count = tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.float64)
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(base + at, mask=at < vocab, other=float('-inf')).to(tl.float32)
        weight = tl.exp(tl.div_rn(x - best, heat))
        taken = (at < vocab) & (weight >= share)
        count += taken.to(tl.int32)
        mass += tl.where(taken, weight, 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _nth(base, key, ordinal, vocab, TILE: tl.constexpr):
    """The id of the token number ``ordinal`` (from 0, in order of ids) with this key."""
    token = tl.full((), 0, tl.int32)
    before = tl.full((), 0, tl.int32)
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(base + at, mask=at < vocab, other=float('-inf')).to(tl.float32)
        same = ((at < vocab) & (_keys(x) == key)).to(tl.int32)
        place = before + tl.cumsum(same, 0) - same
        token += tl.sum(tl.where((same > 0) & (place == ordinal), at, 0), 0)
        before += tl.sum(same, 0)
    return token


@triton.jit
def draw_kernel(
    logits, slots, temperature, top_k, top_p, min_p, has_penalty, seen, last_token, tokens, state, top, uniform, masses,
    candidates, ranked, vocab, tiles,
    SLOTS: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, MOST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kind = tl.load(state + row)
    if kind > 0:
        slot = tl.load(slots + row).to(tl.int64) if SLOTS else row
        heat = tl.load(temperature + slot)
        best = tl.load(top + row)
        chance = tl.load(uniform + row)
        base = logits + row * vocab
        if kind == _WHOLE:
            token = _draw_whole(base, masses + row * tiles, best, heat, chance, vocab, tiles, TILE, TILES)
        else:
            k = tl.load(top_k + slot)
            p = tl.load(top_p + slot).to(tl.float64)
            share = tl.load(min_p + slot)
            places = tl.arange(0, TILES)
            whole = tl.sum(tl.load(masses + row * tiles + places, mask=places < tiles, other=0.0), 0)
            number = tl.load(candidates + row)
            list_ = ranked + row * MOST
            if number <= MOST:
                token = _draw_sorted(list_, number, whole, best, heat, k, p, share, chance, vocab, MOST)
            else:
                token = _draw_searched(base, whole, best, heat, k, p, share, chance, vocab, TILE)
        tl.store(tokens + row, token.to(tokens.dtype.element_ty))
        if SLOTS:
            tl.store(last_token + slot, token)
        if COUNTED:
            if tl.load(has_penalty + slot) > 0:
                at = seen + slot * vocab + token
                old = tl.load(at)
                tl.store(at, tl.where(old < _MOST_SEEN, old + _GENERATED, old).to(tl.int16))
