"""SlotTable: what the device side keeps of each running request, one row of its tables per request.

Life of a slot: ``open`` (at admission and after a preemption) resets everything from the request's known tokens;
``append`` gives it KV blocks; sampling writes ``last_token`` and, where a feature reads it, ``history``; ``close``
forgets it. Tables of numbers that the host knows are numpy arrays; the two that only the device knows are tensors, so
that a step can be launched before the host has seen the tokens of the one before.

With *device tables* (on every device but a CPU), block tables and sampling parameters lie on the device
(:mod:`lmdeploy.runner.tables`); the host's columns then only say which path a row takes.

Positions do the counting: the token at position p is draw ``p - prompt_len`` of its request, so no counter can go wrong
by a preemption, a rejected draft or a second step in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.plan import OpenSlot
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.ops.slots import CHANGES, GENERATED, IN_PROMPT, MOST_SEEN, NO_END
from lmdeploy.runner.tables import DeviceTables, send
from lmdeploy.vl.mrope import GridSpan, mrope_positions

# which positions' logits or hidden states a request wants to see
ROWS_NONE, ROWS_GENERATION, ROWS_ALL = 0, 1, 2
_ROWS = {None: ROWS_NONE, 'generation': ROWS_GENERATION, 'all': ROWS_ALL}
_NO_IDS = np.zeros(0, np.int64)
_NO_VALUES = np.zeros(0, np.float32)


@dataclass(slots=True)
class SlotExtras:
    """The ragged parameters of one request, as arrays; empty where it has none.

    Attributes:
        bad_heads: ``[S, W] int64``: all but the last token of each bad sequence, right-aligned, padded with -1.
        bad_tails: ``[S] int64``: their last tokens.
    """

    params: SamplingParams
    stop_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    banned_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    bias_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    bias_values: np.ndarray = field(default_factory=lambda: _NO_VALUES)
    bad_heads: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    bad_tails: np.ndarray = field(default_factory=lambda: _NO_IDS)

    @property
    def changes(self) -> int:
        """How many logits it changes by a constant: biases, bans, and stop ids before ``min_new_tokens``."""
        stops = len(self.stop_ids) if self.params.min_new_tokens > 0 else 0
        return len(self.bias_ids) + len(self.banned_ids) + stops

    def write_changes(self, out: np.ndarray) -> None:
        """Fill ``out [3, CHANGES] int32`` (ids, bits of values, ends), unless they are too many for it."""
        count = self.changes
        if count > CHANGES:
            return
        stops = self.stop_ids if self.params.min_new_tokens > 0 else _NO_IDS
        banned = len(self.banned_ids) + len(stops)
        out[0, :count] = np.concatenate([self.bias_ids, self.banned_ids, stops])
        out[1, :count] = np.concatenate([self.bias_values, np.full(banned, -np.inf, np.float32)]).view(np.int32)
        out[2, :count] = NO_END
        out[2, count - len(stops) : count] = self.params.min_new_tokens


class SlotTable:
    """Per-slot state of ``slots`` requests with at most ``session_len`` tokens each.

    ``vocab_size`` given: with device tables. With ``mrope`` positions have three rows (:mod:`lmdeploy.vl.mrope`).
    """

    def __init__(self, slots: int, session_len: int, block_size: int, device: torch.device,
                 vocab_size: int | None = None, *, mrope: bool = False) -> None:
        self.size, self.session_len, self.block_size, self.device = slots, session_len, block_size, device
        self.tables = None if vocab_size is None else DeviceTables(slots, session_len, block_size, vocab_size, device)
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device) if self.tables is None else (
            self.tables.sampling.last_token)
        self._entered: list[OpenSlot] = []  # opened, and not yet in the device tables
        self.history = torch.zeros(slots, 0, dtype=torch.int32, device=device)  # [slots, width]; grows when needed
        self.blocks = np.zeros((slots, 8), np.int32)  # block tables, padded with the null block; the width grows
        self.num_blocks = np.zeros(slots, np.int32)
        self.opened = np.zeros(slots, bool)
        slots += 1  # the scratch slot is one of a plain, greedy request
        # sampling parameters
        self.greedy = np.ones(slots, bool)
        self.temperature = np.ones(slots, np.float32)
        self.top_k = np.zeros(slots, np.int64)
        self.top_p = np.ones(slots, np.float64)
        self.min_p = np.zeros(slots, np.float32)
        self.repetition = np.ones(slots, np.float32)
        self.presence = np.zeros(slots, np.float32)
        self.frequency = np.zeros(slots, np.float32)
        self.seed = np.zeros(slots, np.uint64)
        self.prompt_len = np.zeros(slots, np.int64)
        self.min_new_tokens = np.zeros(slots, np.int64)
        self.logprobs = np.full(slots, -1, np.int64)
        # which features a slot uses, so that rows without them cost nothing
        self.has_bias = np.zeros(slots, bool)
        self.has_bans = np.zeros(slots, bool)
        self.has_stops = np.zeros(slots, bool)
        self.has_bad_sequences = np.zeros(slots, bool)
        self.has_processors = np.zeros(slots, bool)
        self.keeps_history = np.zeros(slots, bool)
        self.odd = np.zeros(slots, bool)  # asks for more than device tables offer
        self.plain = np.ones(slots, bool)  # greedy and nothing else
        self.logit_rows = np.zeros(slots, np.uint8)  # ROWS_NONE | ROWS_GENERATION | ROWS_ALL
        self.hidden_rows = np.zeros(slots, np.uint8)
        self.extras: list[SlotExtras | None] = [None] * slots
        # positions of a prompt with pictures: in three rows up to the end of the last, then a difference from the place
        self.mrope = mrope
        self.turns: list[np.ndarray | None] = [None] * slots
        self.turns_end = np.zeros(slots, np.int64)
        self.shift = np.zeros(slots, np.int32)

    def open(self, request: OpenSlot) -> None:
        """Set the slot up for a request; its block table starts empty."""
        slot, params, tokens = request.slot, request.params, request.tokens
        self.close(slot)
        self.opened[slot] = True
        self.greedy[slot] = params.greedy or params.temperature <= 0 or params.top_k == 1
        self.temperature[slot] = params.temperature if params.temperature > 0 else 1.0
        self.top_k[slot], self.top_p[slot], self.min_p[slot] = params.top_k, params.top_p, params.min_p
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot], self.frequency[slot] = params.presence_penalty, params.frequency_penalty
        self.seed[slot] = np.uint64(params.seed % (1 << 64))
        self.prompt_len[slot] = request.prompt_len
        self.min_new_tokens[slot] = params.min_new_tokens
        self.logprobs[slot] = params.logprobs
        self.logit_rows[slot], self.hidden_rows[slot] = _ROWS[params.output_logits], _ROWS[params.output_hidden]
        extras = self.extras[slot] = _extras(params)
        self.has_bias[slot] = len(extras.bias_ids) > 0
        self.has_bans[slot] = len(extras.banned_ids) > 0
        self.has_stops[slot] = len(extras.stop_ids) > 0 and params.min_new_tokens > 0
        self.has_bad_sequences[slot] = len(extras.bad_tails) > 0
        self.has_processors[slot] = bool(params.logits_processors)
        penalised = (params.repetition_penalty != 1.0 or params.presence_penalty != 0.0
                     or params.frequency_penalty != 0.0)
        looks_back = self.has_bad_sequences[slot] or self.has_processors[slot]
        self.keeps_history[slot] = looks_back or (penalised and self.tables is None)
        if self.mrope:
            self._turn(request)
        if self.keeps_history[slot]:
            end = min(self.session_len, request.prompt_len + params.max_new_tokens)
            self.reserve_history(max(len(tokens), end) + 1)
            self.history[slot, : len(tokens)] = send(self.device, np.asarray(tokens, np.int32))[0]
        if self.tables is not None:
            changes = extras.changes
            self.odd[slot] = (
                looks_back or changes > CHANGES or params.logprobs >= 0 or self.logit_rows[slot] != ROWS_NONE
                or self.hidden_rows[slot] != ROWS_NONE)
            self.plain[slot] = self.greedy[slot] and not penalised and not changes
            self._entered.append(request)

    def _turn(self, request: OpenSlot) -> None:
        slot, spans = request.slot, [GridSpan(*grid) for grid in request.grids]
        end = spans[-1].stop if spans else 0
        positions, shift = mrope_positions(end, spans)
        self.turns[slot], self.turns_end[slot], self.shift[slot] = positions, end, shift
        if self.tables is not None:
            self.tables.shift[slot] = shift

    def flush(self) -> None:
        """Write the slots that were opened since the last time into the device tables."""
        entered, self._entered = self._entered, []
        if not entered or self.tables is None:
            return
        slots = np.array([request.slot for request in entered])
        reals = np.stack([
            np.where(self.greedy[slots], 0.0, self.temperature[slots]), self.top_p[slots], self.min_p[slots],
            self.repetition[slots], self.presence[slots], self.frequency[slots]])
        penalised = (reals[3] != 1.0) | (reals[4] != 0.0) | (reals[5] != 0.0)
        integers = np.stack([self.top_k[slots], penalised, self.prompt_len[slots]])
        changes = np.zeros((3, len(slots), CHANGES), np.int32)
        changes[0] = -1
        for row, request in enumerate(entered):
            self.of(request.slot).write_changes(changes[:, row])
            if penalised[row]:
                self.tables.count(request.slot, *_seen(request))
        self.tables.open(slots, reals, integers, self.seed[slots], changes)

    def close(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        self.opened[slot] = False
        if self.tables is None:
            self.blocks[slot] = 0
        self.num_blocks[slot] = 0
        self.extras[slot] = None
        self.keeps_history[slot] = False

    def of(self, slot: int) -> SlotExtras:
        """The ragged parameters of the request in ``slot``, which is open."""
        extras = self.extras[slot]
        assert extras is not None, f'slot {slot} is not open'
        return extras

    def append(self, slots: np.ndarray, block_start: np.ndarray, blocks: np.ndarray) -> None:
        """Append ``blocks[block_start[i]:block_start[i + 1]]`` to the block table of ``slots[i]`` (distinct slots)."""
        if not len(blocks):
            return
        counts = np.diff(block_start)
        rows = np.repeat(np.arange(len(slots)), counts)
        columns = self.num_blocks[slots][rows] + np.arange(len(blocks)) - block_start[:-1][rows]
        if self.tables is not None:
            self.tables.append(slots[rows], columns, blocks)
            self.num_blocks[slots] += counts.astype(np.int32)
            return
        width = self.blocks.shape[1]
        if columns.max() >= width:
            grown = np.zeros((self.size, max(2 * width, int(columns.max()) + 1)), np.int32)
            grown[:, :width] = self.blocks
            self.blocks = grown
        self.blocks[slots[rows], columns] = blocks
        self.num_blocks[slots] += counts.astype(np.int32)

    def write_history(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """``history[slots[i], positions[i]] = tokens[i]``; indices int64 on the device."""
        width = self.history.shape[1]
        self.history.view(-1).scatter_(0, slots * width + positions, tokens.to(torch.int32))

    def read_history(self, slots: Tensor, first: Tensor, columns: Tensor) -> Tensor:
        """``[b, L] int64``: the tokens of ``slots [b]`` at positions ``first[b] + columns[b, L]``."""
        width = self.history.shape[1]
        return self.history.view(-1)[slots[:, None] * width + first[:, None] + columns].long()

    def reserve_history(self, width: int) -> None:
        """Make positions below ``width`` usable in ``history``."""
        old = self.history.shape[1]
        if width > old:
            width = min(max(width, 2 * old, 256), max(width, self.session_len + 1))
            grown = torch.zeros(self.size, width, dtype=torch.int32, device=self.device)
            grown[:, :old] = self.history
            self.history = grown


def _extras(params: SamplingParams) -> SlotExtras:
    singles = [sequence[0] for sequence in params.bad_sequences if len(sequence) == 1]
    longer = [sequence for sequence in params.bad_sequences if len(sequence) > 1]
    heads = np.full((len(longer), max((len(s) for s in longer), default=1) - 1), -1, np.int64)
    for row, sequence in zip(heads, longer):
        row[len(row) - len(sequence) + 1:] = sequence[:-1]
    return SlotExtras(
        params,
        stop_ids=np.array(params.stop_ids, np.int64),
        banned_ids=np.array(sorted({*params.banned_ids, *singles}), np.int64),
        bias_ids=np.array([token for token, _ in params.logit_bias], np.int64),
        bias_values=np.array([value for _, value in params.logit_bias], np.float32),
        bad_heads=heads,
        bad_tails=np.array([sequence[-1] for sequence in longer], np.int64),
    )


def _seen(request: OpenSlot) -> tuple[np.ndarray, np.ndarray]:
    """The distinct tokens of a request, and their entries in the table ``seen``."""
    prompt = np.unique(request.tokens[: request.prompt_len])
    generated, counts = np.unique(request.tokens[request.prompt_len :], return_counts=True)
    tokens = np.union1d(prompt, generated)
    entries = np.zeros(len(tokens), np.int64)
    entries[np.searchsorted(tokens, generated)] = GENERATED * counts
    entries[np.searchsorted(tokens, prompt)] += IN_PROMPT
    return tokens, np.minimum(entries, MOST_SEEN)
