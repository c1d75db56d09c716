"""The last kernel of sampling: one program per row inverts the cumulative distribution of what the row's cuts leave.

A row that cuts nothing off needs one tile: the sums of the tiles say which. A row with cuts has its candidates in a
list. Up to ``SORTED`` of them are sorted; what follows is the reference's arithmetic. Otherwise the two borders, of
what is kept and of what is drawn, are searched for in the range of a logit's 32 bits, a quarter of it at a time: over
the list or, where a flat distribution leaves more than ``LISTED``, over the whole row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.ops.slots import GENERATED, MOST_SEEN
from lmdeploy.ops.triton.launch import gdc_launch_dependents, gdc_wait

DONE, DRAW_WHOLE, DRAW_CUT = 0, 1, 2  # what is left to do for a row
BINS = 256  # of distances from the best, in steps of 1/8; the last holds all that is farther
SORTED, LISTED = 512, 8192  # candidates that are sorted, and that are listed at all
SEARCH = 8192  # elements that a step of a search reads
_WHOLE, _BINS = tl.constexpr(DRAW_WHOLE), tl.constexpr(BINS)
_LOWEST = tl.constexpr(-2139095041)  # the key of -inf
_GENERATED, _MOST_SEEN = tl.constexpr(GENERATED), tl.constexpr(MOST_SEEN)


@triton.jit
def bin_of(scaled):
    """The bin of tokens whose logits over temperature are ``scaled`` (at most 0) above the best's."""
    return tl.minimum(scaled * -8.0, _BINS - 1.0).to(tl.int32)


@triton.jit
def heaviest(count):
    """``[BINS] float64``: no less than the mass of the tokens of each bin, and less than 1.14 times as much."""
    return count.to(tl.float64) * tl.exp(tl.arange(0, _BINS).to(tl.float32) * -0.125).to(tl.float64)


@triton.jit
def keys(x):
    """int32 in the order of float32 numbers; both zeros are one."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The number with this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranks(key, ids):
    """int64 in the order of drawing, the largest first: by key, then the lower id first; never 0."""
    return ((key.to(tl.int64) + 0x80000000) << 31) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def key_of(rank):
    return ((rank >> 31) - 0x80000000).to(tl.int32)


@triton.jit
def id_of(rank):
    return (0x7FFFFFFF - (rank & 0x7FFFFFFF)).to(tl.int32)


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
def _draw_sorted(values, ids, number, whole, best, heat, k, p, share, uniform, vocab, SIZE: tl.constexpr):
    """``whole``: mass of all tokens, where top-k is off."""
    places = tl.arange(0, SIZE)
    there = places < number
    x = tl.load(values + places, mask=there, other=0.0)
    token = tl.load(ids + places, mask=there, other=0)
    order = tl.sort(tl.where(there, ranks(keys(x), token), 0), descending=True)
    weight = tl.where(there, tl.exp(tl.div_rn(value_of(key_of(order)) - best, heat)), 0.0)
    sums = tl.cumsum(weight.to(tl.float64), 0)
    limit = number
    total = whole
    if (k > 0) & (k < vocab):
        limit = tl.minimum(k.to(tl.int32), number)
        total = tl.sum(tl.where(places == limit - 1, sums, 0.0), 0)
    kept = limit
    if p < 1:
        kept = tl.minimum(kept, tl.sum(((sums < p * total) & there).to(tl.int32), 0) + 1)
    kept = tl.maximum(tl.minimum(kept, tl.sum(((weight >= share) & there).to(tl.int32), 0)), 1)
    goal = _goal(uniform, tl.sum(tl.where(places == kept - 1, sums, 0.0), 0))
    place = tl.minimum(tl.sum(((sums <= goal) & (places < kept)).to(tl.int32), 0), kept - 1)
    return id_of(tl.sum(tl.where(places == place, order, 0), 0))


@triton.jit
def _above(values, number, first, second, third, by_number, best, heat, TILE: tl.constexpr):
    """How many of ``number`` values are at least each of three (``by_number``), or their masses, as float64.

    A lane adds few weights, in float32; lanes are added in float64.
    """
    sum1 = tl.zeros((TILE // 4,), tl.float32)
    sum2 = tl.zeros((TILE // 4,), tl.float32)
    sum3 = tl.zeros((TILE // 4,), tl.float32)
    cold = 1.0 / heat
    for start in range(0, number, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values + at, mask=at < number, other=float('nan'))
        weight = tl.where(by_number, 1.0, tl.exp((x - best) * cold))
        sum1 += _lanes(tl.where(x >= first, weight, 0.0))
        sum2 += _lanes(tl.where(x >= second, weight, 0.0))
        sum3 += _lanes(tl.where(x >= third, weight, 0.0))
    return tl.sum(sum1.to(tl.float64), 0), tl.sum(sum2.to(tl.float64), 0), tl.sum(sum3.to(tl.float64), 0)


@triton.jit
def _beyond(values, number, value, best, heat, TILE: tl.constexpr):
    """Count and mass of what is above ``value``."""
    count = tl.zeros((TILE // 4,), tl.int32)
    mass = tl.zeros((TILE // 4,), tl.float32)
    for start in range(0, number, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values + at, mask=at < number, other=float('-inf'))
        count += _lanes((x > value).to(tl.int32))
        mass += _lanes(tl.where(x > value, tl.exp(tl.div_rn(x - best, heat)), 0.0))
    return tl.sum(count, 0), tl.sum(mass.to(tl.float64), 0)


@triton.jit
def _lanes(x):
    """Sums of four neighbours, which one thread holds."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 4, 4)), 1)


@triton.jit
def _border(values, number, goal, strict, by_number, count_of, best, heat, TILE: tl.constexpr):
    """Where the ranking reaches ``goal``, a number of tokens or a mass, or passes it (``strict``).

    ``count_of [BINS]`` tells where to look first.

    Returns:
        The largest logit at which the tokens of at least this reach the goal; count and mass above it; its weight.
    """
    most = tl.cumsum(tl.where(by_number, count_of.to(tl.float64), heaviest(count_of)), 0)
    least = most * tl.where(by_number, 1.0, 0.88)
    near = tl.sum((most < goal).to(tl.int32), 0).to(tl.float32) * 0.125
    far = tl.minimum(tl.sum((least <= goal).to(tl.int32), 0) + 1, _BINS).to(tl.float32) * 0.125
    # the tokens of at least ``low`` reach the goal, those above ``high`` do not
    low = tl.full((), _LOWEST, tl.int64)
    high = keys(best).to(tl.int64)
    first = tl.minimum(tl.maximum(keys(best - far * heat).to(tl.int64) - 64, low + 1), high)
    third = tl.minimum(tl.maximum(keys(best - near * heat).to(tl.int64) + 64, low + 1), high)
    second = third
    while low < high:
        s1, s2, s3 = _above(values, number, value_of(first.to(tl.int32)), value_of(second.to(tl.int32)),
                            value_of(third.to(tl.int32)), by_number, best, heat, TILE)  # fmt: skip
        at1 = (s1 > goal) | ((s1 == goal) & (strict == 0))
        at2 = (s2 > goal) | ((s2 == goal) & (strict == 0))
        at3 = (s3 > goal) | ((s3 == goal) & (strict == 0))
        low = tl.where(at3, third, tl.where(at2, second, tl.where(at1, first, low)))
        high = tl.where(at3, high, tl.where(at2, third, tl.where(at1, second, first)) - 1)
        span = high - low
        first = low + (span + 3) // 4
        second = low + (span + 1) // 2
        third = high - span // 4
    value = value_of(low.to(tl.int32))
    count, mass = _beyond(values, number, value, best, heat, TILE)
    return value, count, mass, tl.exp(tl.div_rn(value - best, heat)).to(tl.float64)


@triton.jit
def _heavy(values, number, share, best, heat, TILE: tl.constexpr):
    """Count and mass of the tokens with weights of at least ``share``."""
    count = tl.zeros((TILE // 4,), tl.int32)
    mass = tl.zeros((TILE // 4,), tl.float32)
    for start in range(0, number, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values + at, mask=at < number, other=float('-inf'))
        weight = tl.exp(tl.div_rn(x - best, heat))
        taken = (at < number) & (weight >= share)
        count += _lanes(taken.to(tl.int32))
        mass += _lanes(tl.where(taken, weight, 0.0))
    return tl.sum(count, 0), tl.sum(mass.to(tl.float64), 0)


@triton.jit
def _tied(values, ids, number, listed, value, last, TILE: tl.constexpr):
    """Of the tokens with this logit and ids up to ``last``: how many, the lowest id, the highest."""
    count = tl.zeros((TILE,), tl.int32)
    lowest = tl.full((TILE,), 0x7FFFFFFF, tl.int32)
    highest = tl.zeros((TILE,), tl.int32)
    for start in range(0, number, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values + at, mask=at < number, other=float('-inf'))
        token = tl.where(listed, tl.load(ids + at, mask=(at < number) & listed, other=0), at)
        same = (at < number) & (x == value) & (token <= last)
        count += same.to(tl.int32)
        lowest = tl.where(same, tl.minimum(lowest, token), lowest)
        highest = tl.where(same, tl.maximum(highest, token), highest)
    return tl.sum(count, 0), tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def _draw_searched(values, ids, number, listed, whole, count_of, best, heat, k, p, share, uniform, vocab,
                   TILE: tl.constexpr):  # fmt: skip
    """``count_of [BINS]`` says where to look; ``listed``: the values are a list with their ``ids``."""
    by_number = (k > 0) & (k < vocab)
    kept = tl.where(by_number, k, vocab).to(tl.int32)  # of the best tokens
    total = whole
    kept_mass = whole
    value = best
    count = tl.full((), 0, tl.int32)
    goal = total
    mass = total
    weight = total
    for stage in range(3):  # the border of top-k, that of top-p, and the draw
        if (stage == 2) | ((stage == 1) & (p < 1)) | ((stage == 0) & by_number):
            if (stage == 2) & (share > 0):
                heavy, heavy_mass = _heavy(values, number, share, best, heat, TILE)
                if heavy < kept:
                    kept = heavy
                    kept_mass = heavy_mass
            goal = tl.where(stage == 0, kept.to(tl.float64), tl.where(stage == 1, p * total, _goal(uniform, kept_mass)))
            value, count, mass, weight = _border(values, number, goal, stage == 2, stage == 0, count_of, best, heat,
                                                 TILE)  # fmt: skip
            if stage == 0:
                total = mass + (kept - count).to(tl.float64) * weight
                kept_mass = total
            elif stage == 1:
                more = tl.ceil((goal - mass) / tl.maximum(weight, 1e-300))
                more = tl.minimum(tl.maximum(more, 1.0), vocab * 1.0)
                if count + more.to(tl.int32) < kept:
                    kept = count + more.to(tl.int32)
                    kept_mass = mass + more * weight
    ordinal = tl.maximum(tl.floor((goal - mass) / tl.maximum(weight, 1e-300)), 0.0)
    ordinal = tl.minimum(ordinal, (kept - 1 - count).to(tl.float64)).to(tl.int32)
    # equal logits: halve the range of ids
    lowest = tl.full((), 0, tl.int32)
    highest = vocab - 1
    middle = highest
    while lowest < highest:
        upto, least, most = _tied(values, ids, number, listed, value, middle, TILE)
        ordinal = tl.where(middle == vocab - 1, tl.minimum(ordinal, upto - 1), ordinal)  # rounding
        passed = upto > ordinal
        lowest = tl.where(passed, tl.maximum(lowest, least), middle + 1)
        highest = tl.where(passed, most, highest)
        middle = (lowest + highest) // 2
    return lowest


@triton.jit
def draw_kernel(
    logits, slots, temperature, top_k, top_p, min_p, has_penalty, seen, last_token, tokens, state, top, uniform, masses,
    counts, candidates, values, ids, vocab, tiles,
    SLOTS: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SORTED: tl.constexpr,
    LISTED: tl.constexpr, SEARCH: tl.constexpr, PDL: tl.constexpr,
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
            listed = row * LISTED
            if number <= SORTED:
                token = _draw_sorted(values + listed, ids + listed, number, whole, best, heat, k, p, share, chance,
                                     vocab, SORTED)  # fmt: skip
            else:
                of = values + listed
                in_list = number <= LISTED
                if number > LISTED:
                    of = base
                    number = vocab
                count_of = tl.load(counts + row * _BINS + tl.arange(0, _BINS))
                token = _draw_searched(of, ids + listed, number, in_list, whole, count_of, best, heat, k, p, share,
                                       chance, vocab, SEARCH)  # fmt: skip
        tl.store(tokens + row, token.to(tokens.dtype.element_ty))
        if SLOTS:
            tl.store(last_token + slot, token)
        if COUNTED:
            if tl.load(has_penalty + slot) > 0:
                note(seen + slot * vocab + token)


@triton.jit
def note(at):
    """Count a generated token, up to what the type holds."""
    old = tl.load(at)
    tl.store(at, tl.where(old < _MOST_SEEN, old + _GENERATED, old).to(tl.int16))
