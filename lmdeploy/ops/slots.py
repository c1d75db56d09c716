"""Sampling over slots: every request's parameters lie in tables on the device, so that a step's sampling needs no input
from the host but the slots and positions of its rows, and can be part of a graph.

Contract of :func:`sample_slots`, every row by its slot's parameters and independent of the others. In this order:

1. changes: ``change_values`` is added to the logits of ``change_ids`` while the row's draw is below ``change_until``
   (a bias, or -inf for a ban; stop ids are banned until ``min_new_tokens``);
2. penalties, from the counts in ``seen``: repetition where a token was seen at all, presence where it was generated,
   frequency times as often as it was;
3. temperature (0: the largest logit, the lowest id among equals), top-k, top-p, min-p and the draw, as
   :mod:`lmdeploy.ops.sample` defines them, with ``uniforms(seed, draw)``. A row's draw number is
   ``position + 1 - prompt_len``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.ops import sample
from lmdeploy.ops.table import op

CHANGES = 32  # entries of a slot's list of changes; a request with more is not served by the tables alone
NO_END = 2**31 - 1  # a change that is never over
IN_PROMPT, GENERATED, MOST_SEEN = 1, 2, 32766  # of ``seen``: bit 0, the unit of the count above it, where it stops
FINE, NOT_FINITE, NOTHING_LEFT = 0, 1, 2  # statuses, the numbers of lmdeploy.engine.plan
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


@dataclass(slots=True)
class SamplingTables:
    """Sampling state by slot, on the device; S slots, and one more that padding rows use.

    ``seen`` has no columns until a request needs it.
    """

    last_token: Tensor  # [S+1] int32: what was drawn last
    temperature: Tensor  # [S+1] float32; 0 is greedy
    top_k: Tensor  # [S+1] int32; 0 is off
    top_p: Tensor  # [S+1] float32; 1 is off
    min_p: Tensor  # [S+1] float32; 0 is off
    repetition: Tensor  # [S+1] float32; 1 is off
    presence: Tensor  # [S+1] float32; 0 is off
    frequency: Tensor  # [S+1] float32; 0 is off
    has_penalty: Tensor  # [S+1] int32: whether any of the three is on
    prompt_len: Tensor  # [S+1] int32
    seed: Tensor  # [S+1] int64: the bits of an unsigned one
    change_ids: Tensor  # [S+1, CHANGES] int32, -1 where unused
    change_values: Tensor  # [S+1, CHANGES] float32
    change_until: Tensor  # [S+1, CHANGES] int32
    seen: Tensor  # [S+1, V] int16, or [S+1, 0]


@op
def sample_slots(logits: Tensor, slots: Tensor, positions: Tensor, tables: SamplingTables,
                 plain: bool) -> tuple[Tensor, Tensor]:
    """Draw a token per row, and note it in ``tables.last_token`` and (with penalties) in ``tables.seen``.

    Args:
        logits: ``[R, V]`` of any floating type; may be changed.
        slots: ``[R] int32``. positions: ``[R] int32`` of the tokens whose logits these are.
        plain: the caller knows that every row is greedy, without changes and penalties.

    Returns:
        ``tokens [R] int32`` and ``status [R] uint8``: NOT_FINITE where a logit was NaN or +inf, NOTHING_LEFT where all
        were -inf or banned (the token is 0 in both cases), FINE otherwise.
    """
    at = slots.long()
    logits = logits.float()
    good = logits.amax(-1) < float('inf')  # a NaN wins every maximum
    logits = logits.masked_fill(~good[:, None], 0.0)
    draws = positions + 1 - tables.prompt_len[at]
    if not plain:
        logits = _penalise(_change(logits, at, draws, tables), at, tables)
    live = logits.amax(-1) > float('-inf')
    logits = logits.masked_fill(~live[:, None], 0.0)
    tokens = sample.greedy(logits)
    if not plain:
        temperature = tables.temperature[at]
        drawn = sample.draw(
            logits, torch.where(temperature > 0, temperature, 1.0), tables.top_k[at].long(), tables.top_p[at].double(),
            tables.min_p[at], uniforms(tables.seed[at], draws.clamp(min=0).long()))
        tokens = torch.where(temperature > 0, drawn, tokens)
    fine = good & live
    tokens = torch.where(fine, tokens, 0)
    tables.last_token[at] = tokens.int()
    if not plain and tables.seen.shape[1]:
        _note(tokens, at, tables)
    return tokens.int(), torch.where(good, torch.where(live, FINE, NOTHING_LEFT), NOT_FINITE).to(torch.uint8)


def uniforms(seeds: Tensor, draws: Tensor) -> Tensor:
    """:func:`lmdeploy.ops.sample.uniforms` on the device: ``seeds [R]``, ``draws [R]`` int64 give ``[R] float64``."""
    state = _mix(seeds + _GOLDEN) + (draws + 1) * _GOLDEN
    return _shift(_mix(state), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _change(logits: Tensor, at: Tensor, draws: Tensor, tables: SamplingTables) -> Tensor:
    ids = tables.change_ids[at]
    active = (ids >= 0) & (draws[:, None] < tables.change_until[at])
    return logits.scatter_add(1, ids.clamp(min=0).long(), torch.where(active, tables.change_values[at], 0.0))


def _penalise(logits: Tensor, at: Tensor, tables: SamplingTables) -> Tensor:
    if not tables.seen.shape[1]:
        return logits
    on = (tables.has_penalty[at] > 0)[:, None]
    seen = torch.where(on, tables.seen[at].int(), 0)
    factor, generated = tables.repetition[at][:, None], seen >> 1
    punished = torch.where(logits < 0, logits * factor, logits / factor)
    logits = torch.where(seen > 0, punished, logits)
    logits = logits - tables.presence[at][:, None] * (generated > 0)
    return logits - tables.frequency[at][:, None] * generated


def _note(tokens: Tensor, at: Tensor, tables: SamplingTables) -> None:
    flat = tables.seen.view(-1)
    index = at * tables.seen.shape[1] + tokens
    old = flat[index]
    counted = (tables.has_penalty[at] > 0) & (old < MOST_SEEN)
    flat[index] = torch.where(counted, old + GENERATED, old)


@op
def decode_inputs(packed: Tensor, blocks: Tensor, last_token: Tensor, block_size: int
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a forward of one token per row needs, from what the host sends of each row.

    Args:
        packed: ``[4, R] int32``: slots; positions; tokens, or -1 for the slot's last one; the block that the row is the
            first to use, or 0.
        blocks: ``[S+1, width] int32``: the block tables, which get the new blocks.
        last_token: ``[S+1] int32``.

    Returns:
        ``token_ids [R] int32``, ``positions [R] int32``, ``kv_slots [R] int64`` and ``kv_lens [R] int32``.
    """
    slots, positions, tokens, new = packed
    at = slots.long()
    entries = at * blocks.shape[1] + positions // block_size
    flat = blocks.view(-1)
    current = torch.where(new > 0, new, flat[entries])
    flat[entries] = current
    token_ids = torch.where(tokens < 0, last_token[at], tokens)
    return token_ids, positions.clone(), current.long() * block_size + positions % block_size, positions + 1


@op
def keep_results(results: Tensor, turn: Tensor, tokens: Tensor, status: Tensor) -> None:
    """Write a step's ``tokens [R] int32``, then its ``status [R] uint8``, into row ``turn`` of ``results``.

    Args:
        results: ``[rows, 2 R or more] int32``.
        turn: ``[1] int32``.
    """
    results[:, : 2 * len(tokens)].index_copy_(0, turn.long(), torch.cat((tokens, status.int()))[None])


@op
def chunk_inputs(by_token: Tensor, by_row: Tensor, starts: Tensor, blocks: Tensor, last_token: Tensor, block_size: int
                 ) -> tuple[Tensor, ...]:
    """What a forward of decodes and chunks needs, from what the host sends, in memory of its own.

    Args:
        by_token: ``[3, T] int32``: ids, or -1 for the slot's last one; positions; slots.
        by_row: ``[5, R] int32``: slots, cached tokens, output tokens, slots that are drawn for, their positions.
        starts: ``[R+1] int32``: where the queries begin.
        blocks: ``[S+1, width] int32``. last_token: ``[S+1] int32``.

    Returns:
        ``token_ids, positions [T] int32``, ``kv_slots [T] int64``, ``slots, kv_lens [R] int32``,
        ``query_start [R+1] int32``, ``outputs [R] int64``, ``drawing, at [R] int32``.
    """
    ids, positions, slots = by_token
    at = slots.long()
    block = blocks.view(-1)[at * blocks.shape[1] + positions // block_size]
    token_ids = torch.where(ids < 0, last_token[at], ids)
    row_slots, kv_lens, outputs, drawing, drawn_at = by_row.clone()
    kv_slots = block.long() * block_size + positions % block_size
    return token_ids, positions.clone(), kv_slots, row_slots, kv_lens, starts.clone(), outputs.long(), drawing, drawn_at
