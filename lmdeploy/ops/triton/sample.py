"""Sampling over slots on a GPU, without sorting the vocabulary and without asking the host; see lmdeploy.ops.slots.

A vocabulary is cut into tiles; a row is shared out over as many programs as fill the device. Four kernels:

1. ``_best_kernel`` changes and penalises logits and finds the best token of every row. Greedy rows are done then, and a
   step of greedy rows only launches nothing else. What makes a row's program the last one is a counter.
2. ``_mass_kernel`` sums the weights of every tile and, for rows with cuts, counts tokens by their distance from the
   best, in steps of 1/8 of the logarithm.
3. ``_gather_kernel`` lists the tokens that may survive a row's cuts: all within the distance that the counts tell.
4. ``draw_kernel`` (:mod:`lmdeploy.ops.triton.draw`) draws from those, or from the tiles where a row cuts nothing off.

Rows that have nothing to do in a kernel leave it after reading one number. A row's result does not depend on the others
or on how many there are: sums are kept per tile, and the order in which programs arrive decides nothing.

Logits that compare equal are ranked by their ids, as in the reference. Weights are exponentials of this processor: a
draw within some 1e-7 of the border between two tokens may fall on the other side of it than the reference's.

Bound: bytes. Greedy rows are read once; rows that draw three times, of which two find the logits in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.sample import draw, greedy
from lmdeploy.ops.slots import FINE, NOT_FINITE, NOTHING_LEFT, SamplingTables, sample_slots
from lmdeploy.ops.triton.draw import (
    BINS,
    DONE,
    DRAW_CUT,
    DRAW_WHOLE,
    LISTED,
    SEARCH,
    SORTED,
    bin_of,
    draw_kernel,
    heaviest,
    id_of,
    key_of,
    keys,
    note,
    ranks,
    value_of,
)
from lmdeploy.ops.triton.launch import (
    Workspace,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    multiprocessors,
    next_power_of_2,
    supports_pdl,
)

TILE = 2048
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)
_FINE, _NOTHING_LEFT, _NOT_FINITE = tl.constexpr(FINE), tl.constexpr(NOTHING_LEFT), tl.constexpr(NOT_FINITE)
_DONE, _WHOLE, _CUT = tl.constexpr(DONE), tl.constexpr(DRAW_WHOLE), tl.constexpr(DRAW_CUT)
PLAIN, SLOTS, GIVEN = 0, 1, 2  # greedy rows only; parameters by slot; parameters by row, and uniform numbers
_PLAIN, _SLOTS, _BINS = tl.constexpr(PLAIN), tl.constexpr(SLOTS), tl.constexpr(BINS)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 30)) * tl.full((), _MIX1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), _MIX2, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, draw_number):
    """:func:`lmdeploy.ops.sample.uniforms` of two scalars."""
    golden = tl.full((), _GOLDEN, tl.uint64)
    state = _mixed(seed.to(tl.uint64) + golden) + (draw_number.to(tl.uint64) + 1) * golden
    return (_mixed(state) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=['tiles_each', 'programs'])
def _best_kernel(
    logits, slots, positions, temperature, top_k, top_p, min_p, repetition, presence, frequency, has_penalty,
    prompt_len, seed, change_ids, change_values, change_until, seen, last_token, tokens, status,
    best, arrived, state, top, uniform, counts, found, vocab, tiles_each, programs,
    MODE: tl.constexpr, COUNTED: tl.constexpr, CHANGES: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    first = part * tiles_each * TILE
    end = tl.minimum(vocab, first + tiles_each * TILE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + row).to(tl.int64) if MODE <= _SLOTS else row
    base = logits + row * vocab
    penalised = False
    if MODE == _SLOTS:
        draw_number = tl.maximum(tl.load(positions + row) + 1 - tl.load(prompt_len + slot), 0)
        entries = tl.arange(0, CHANGES)
        ids = tl.load(change_ids + slot * CHANGES + entries)
        if tl.max(ids, 0) >= 0:
            active = (ids >= first) & (ids < end) & (draw_number < tl.load(change_until + slot * CHANGES + entries))
            values = tl.load(change_values + slot * CHANGES + entries, mask=active, other=0.0)
            tl.atomic_add(base + tl.maximum(ids, 0), values, mask=active)
            tl.debug_barrier()  # the tiles are read after the changes
        if COUNTED:
            penalised = tl.load(has_penalty + slot) > 0
            factor = tl.load(repetition + slot)
            once = tl.load(presence + slot)
            each = tl.load(frequency + slot)
    most = tl.full((TILE,), float('-inf'), tl.float32)  # of each lane, and where: the first of equals
    place = first + tl.arange(0, TILE)
    for start in tl.range(first, end, TILE, num_stages=3 if MODE == _PLAIN else 1):
        at = start + tl.arange(0, TILE)
        there = at < end
        x = tl.load(base + at, mask=there, other=float('-inf')).to(tl.float32)
        if MODE == _SLOTS:
            if COUNTED:
                if penalised:
                    count = tl.load(seen + slot * vocab + at, mask=there, other=0).to(tl.int32)
                    x = tl.where(count > 0, tl.where(x < 0, x * factor, tl.div_rn(x, factor)), x)
                    generated = count >> 1
                    x = x - once * tl.where(generated > 0, 1.0, 0.0) - each * generated.to(tl.float32)
                    tl.store(base + at, x, mask=there)
        x = tl.where(x < float('inf'), x, float('inf'))  # NaN too: it shall win
        place = tl.where(x > most, at, place)
        most = tl.maximum(x, most)
    here = tl.max(tl.where(place < vocab, ranks(keys(most), place), 0), 0)
    tl.atomic_max(best + row, here, sem='relaxed')
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem='acq_rel') == programs - 1:
        winner = tl.atomic_max(best + row, 0)
        tl.store(best + row, 0)
        tl.store(arrived + row, 0)
        token = id_of(winner)
        value = value_of(key_of(winner))
        good = value < float('inf')
        live = value > float('-inf')
        token = tl.where(good & live, token, 0)
        tl.store(status + row, tl.where(good, tl.where(live, _FINE, _NOTHING_LEFT), _NOT_FINITE).to(tl.uint8))
        next_state = 0
        if MODE != _PLAIN:
            hot = tl.load(temperature + slot) > 0
            k = tl.load(top_k + slot)
            cut = ((k > 0) & (k < vocab)) | (tl.load(top_p + slot) < 1) | (tl.load(min_p + slot) > 0)
            next_state = tl.where(hot & good & live, tl.where(cut, _CUT, _WHOLE), _DONE)
            tl.store(state + row, next_state)
            tl.store(top + row, value)
            tl.store(found + row, 0)
            tl.store(counts + row * _BINS + tl.arange(0, _BINS), tl.zeros((_BINS,), tl.int32))
            if MODE == _SLOTS:
                tl.store(uniform + row, _uniform(tl.load(seed + slot), draw_number))
        if next_state == 0:
            tl.store(tokens + row, token.to(tokens.dtype.element_ty))
            if MODE <= _SLOTS:
                tl.store(last_token + slot, token)
            if COUNTED:
                if penalised:
                    note(seen + slot * vocab + token)


@triton.jit(do_not_specialize=['tiles_each', 'programs'])
def _mass_kernel(
    logits, slots, temperature, state, top, masses, counts, vocab, tiles, tiles_each, programs,
    MODE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kind = tl.load(state + row)
    if kind != _DONE:
        slot = tl.load(slots + row).to(tl.int64) if MODE == _SLOTS else row
        heat = tl.load(temperature + slot)
        best = tl.load(top + row)
        count = tl.zeros((_BINS,), tl.int32)
        for tile in range(part * tiles_each, tl.minimum(tiles, (part + 1) * tiles_each)):
            at = tile * TILE + tl.arange(0, TILE)
            there = at < vocab
            x = tl.load(logits + row * vocab + at, mask=there, other=float('-inf'))
            scaled = tl.div_rn(x - best, heat)
            tl.store(masses + row * tiles + tile, tl.sum(tl.exp(scaled).to(tl.float64), 0))
            if kind == _CUT:
                count += tl.histogram(bin_of(scaled), _BINS, mask=there)
        if kind == _CUT:
            tl.atomic_add(counts + row * _BINS + tl.arange(0, _BINS), count, mask=count > 0, sem='relaxed')


@triton.jit(do_not_specialize=['tiles_each', 'programs'])
def _gather_kernel(
    logits, slots, temperature, top_k, top_p, min_p, state, top, masses, counts, found, candidates, values, ids, vocab,
    tiles, tiles_each, programs,
    MODE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, LISTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tl.load(state + row) == _CUT:
        slot = tl.load(slots + row).to(tl.int64) if MODE == _SLOTS else row
        heat = tl.load(temperature + slot)
        best = tl.load(top + row)
        k = tl.load(top_k + slot)
        p = tl.load(top_p + slot).to(tl.float64)
        share = tl.load(min_p + slot)
        bins = tl.arange(0, _BINS)
        count = tl.load(counts + row * _BINS + bins)
        # the deepest bin that holds a token that the cuts may leave
        floor = _BINS - 1
        by_number = (k > 0) & (k < vocab)
        if by_number:
            floor = tl.minimum(floor, tl.sum((tl.cumsum(count, 0) < k).to(tl.int32), 0))
        elif p < 1:
            places = tl.arange(0, TILES)
            mass = tl.sum(tl.load(masses + row * tiles + places, mask=places < tiles, other=0.0), 0)
            most = heaviest(count)
            beyond = tl.sum(most, 0) - tl.cumsum(most, 0)
            floor = tl.minimum(floor, tl.sum((beyond > (1 - p) * mass * 0.999).to(tl.int32), 0))
        if (share > 0) & ((p == 1) | (by_number == 0)):  # with both others the mass of the k best must be known
            floor = tl.minimum(floor, (tl.minimum(-tl.log(share), 1e6) * 8).to(tl.int32) + 1)
        number = tl.sum(tl.where(bins <= floor, count, 0), 0)
        if part == 0:
            tl.store(candidates + row, number)
        if number <= LISTED:
            for tile in range(part * tiles_each, tl.minimum(tiles, (part + 1) * tiles_each)):
                at = tile * TILE + tl.arange(0, TILE)
                x = tl.load(logits + row * vocab + at, mask=at < vocab, other=float('-inf'))
                taken = ((at < vocab) & (bin_of(tl.div_rn(x - best, heat)) <= floor)).to(tl.int32)
                here = tl.sum(taken, 0)
                if here > 0:
                    place = tl.atomic_add(found + row, here, sem='relaxed') + tl.cumsum(taken, 0) - taken
                    tl.store(values + row * LISTED + place, x, mask=taken > 0)
                    tl.store(ids + row * LISTED + place, at, mask=taken > 0)


_BEST, _ARRIVED = Workspace(torch.int64), Workspace(torch.int32)


@sample_slots.impl('cuda')
def triton_sample_slots(logits: Tensor, slots: Tensor, positions: Tensor, tables: SamplingTables,
                        plain: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    status = torch.empty(len(logits), dtype=torch.uint8, device=logits.device)
    if len(logits):
        _sample(logits, slots, positions, tables, PLAIN if plain else SLOTS, tokens, status)
    return tokens, status


@greedy.impl('cuda')
def triton_greedy(logits: Tensor) -> Tensor:
    rows, device = len(logits), logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        nothing = torch.empty(rows, dtype=torch.int32, device=device)
        each = torch.arange(rows, device=device)
        _sample(logits, each, each, _tables(nothing), PLAIN, tokens, torch.empty_like(nothing, dtype=torch.uint8))
    return tokens


@draw.impl('cuda')
def triton_draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
                uniform: Tensor) -> Tensor:  # fmt: skip
    rows, device = len(logits), logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        nothing = torch.empty(rows, dtype=torch.int32, device=device)
        tables = _tables(nothing, temperature, top_k, top_p, min_p)
        _sample(logits, nothing, nothing, tables, GIVEN, tokens, torch.empty_like(nothing, dtype=torch.uint8), uniform)
    return tokens


def _tables(nothing: Tensor, temperature: Tensor | None = None, top_k: Tensor | None = None,
            top_p: Tensor | None = None, min_p: Tensor | None = None) -> SamplingTables:  # fmt: skip
    """Tables by row, with ``nothing`` where a mode does not look."""
    temperature, top_k, top_p, min_p = (nothing if t is None else t for t in (temperature, top_k, top_p, min_p))
    return SamplingTables(
        last_token=nothing, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition=nothing,
        presence=nothing, frequency=nothing, has_penalty=nothing, prompt_len=nothing, seed=nothing, change_ids=nothing,
        change_values=nothing, change_until=nothing, seen=nothing[:, None][:, :0],
    )  # fmt: skip


def _sample(logits: Tensor, slots: Tensor, positions: Tensor, tables: SamplingTables, mode: int, tokens: Tensor,
            status: Tensor, uniform: Tensor | None = None) -> None:  # fmt: skip
    (rows, vocab), tile = logits.shape, TILE
    device = logits.device
    if mode != PLAIN or not logits.is_contiguous():
        logits = logits.float().contiguous()
    pdl = supports_pdl(device)
    tiles = cdiv(vocab, tile)
    each = cdiv(tiles, max(1, min(tiles, cdiv(4 * multiprocessors(device), rows))))
    programs = cdiv(tiles, each)
    best, arrived = _BEST.get(device, rows), _ARRIVED.get(device, rows)
    state = top = found = counts = None
    if mode != PLAIN:
        state, found, candidates = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(3))
        top = torch.empty(rows, dtype=torch.float32, device=device)
        masses = torch.empty(rows, tiles, dtype=torch.float64, device=device)
        counts = torch.empty(rows, BINS, dtype=torch.int32, device=device)
        values = torch.empty(rows, LISTED, dtype=torch.float32, device=device)
        ids = torch.empty(rows, LISTED, dtype=torch.int32, device=device)
        if uniform is None:
            uniform = torch.empty(rows, dtype=torch.float64, device=device)
    counted = mode == SLOTS and tables.seen.shape[1] > 0
    t = tables
    _best_kernel[(rows * programs,)](
        logits, slots, positions, t.temperature, t.top_k, t.top_p, t.min_p, t.repetition, t.presence, t.frequency,
        t.has_penalty, t.prompt_len, t.seed, t.change_ids, t.change_values, t.change_until, t.seen, t.last_token,
        tokens, status, best, arrived, state, top, uniform, counts, found, vocab, each, programs,
        MODE=mode, COUNTED=counted, CHANGES=t.change_ids.shape[-1] if mode == SLOTS else 1, TILE=tile, PDL=pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    if mode == PLAIN:
        return
    _mass_kernel[(rows * programs,)](
        logits, slots, t.temperature, state, top, masses, counts, vocab, tiles, each, programs,
        MODE=mode, TILE=tile, PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    _gather_kernel[(rows * programs,)](
        logits, slots, t.temperature, t.top_k, t.top_p, t.min_p, state, top, masses, counts, found, candidates,
        values, ids, vocab, tiles, each, programs,
        MODE=mode, TILE=tile, TILES=next_power_of_2(tiles), LISTED=LISTED, PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    draw_kernel[(rows,)](
        logits, slots, t.temperature, t.top_k, t.top_p, t.min_p, t.has_penalty, t.seen, t.last_token, tokens, state,
        top, uniform, masses, counts, candidates, values, ids, vocab, tiles,
        SLOTS=mode == SLOTS, COUNTED=counted, TILE=tile, TILES=next_power_of_2(tiles), SORTED=SORTED,
        LISTED=LISTED, SEARCH=SEARCH, PDL=pdl, num_warps=16, launch_pdl=pdl,
    )  # fmt: skip
