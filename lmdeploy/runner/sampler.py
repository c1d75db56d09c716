"""The sampler: from a step's logits to accepted tokens, vectorised over the batch, every row by its own parameters.

A *site* is one position that a token is drawn from; a row has one, and one more per draft token. The order of changes
is that of :class:`~lmdeploy.engine.sampling.SamplingParams`. Log-probabilities are those of the model itself: of the
logits before masks, biases, penalties and temperature, as in OpenAI's API.

With device tables, most of this is one op over slots (:func:`lmdeploy.ops.slots.sample_slots`), and only what the
tables do not hold is done before it.

Nothing here depends on which other rows are in the batch: draws use a counter-based generator, and all sums run along
one row in an order of their own. A row that cannot be sampled (logits not finite, nothing allowed, a logits processor
that raised) gets a status and no token; its neighbours never notice. Nothing waits for the device, except for rows
with logits processors, which are Python code of the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.plan import DEAD_MASK, NON_FINITE, OK, PROCESSOR_FAILED
from lmdeploy.ops import logits as change
from lmdeploy.ops import sample as ops
from lmdeploy.ops.slots import CHANGES, sample_slots
from lmdeploy.parallel.group import ALONE, Group
from lmdeploy.runner.inputs import upload
from lmdeploy.runner.slots import SlotTable
from lmdeploy.runner.tables import DeviceTables, send


@dataclass(slots=True)
class Sites:
    """The S sites of a step, on the host, row by row: those of the b-th row that draws are ``start[b]:start[b + 1]``.

    Attributes:
        rows: ``[b] int64``: the plan's rows that draw.
        slots: ``[S] int64``. positions: ``[S] int64`` of the token whose logits these are.
        start: ``[b+1] int64`` over the sampling rows.
        drafts: ``[S] int64``: the draft token proposed for this site's draw, -1 for the last site of each row.
        masked: ``[M] int64``: the sites with a grammar mask. masks: ``[M, ceil(V/32)] int32``.
    """

    rows: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    start: np.ndarray
    drafts: np.ndarray
    masked: np.ndarray | None = None
    masks: np.ndarray | None = None


@dataclass(slots=True)
class SiteLogprobs:
    """Log-probabilities at ``sites [m]``: ``chosen [m]``, the k best ``ids [m, k]`` and ``values [m, k]``.

    Row i asked for ``wanted[i]`` of the k best; ``sites`` and ``wanted`` are host arrays.
    """

    sites: np.ndarray
    wanted: np.ndarray
    chosen: Tensor
    ids: Tensor
    values: Tensor


@dataclass(slots=True)
class Sampled:
    """What a step drew at ``sites``; tensors on the device."""

    sites: Sites
    tokens: Tensor  # [S] int64
    accepted: Tensor  # [b] int64: how many of the row's tokens count
    status: Tensor  # [b] uint8
    logprobs: SiteLogprobs | None = None
    errors: dict[int, str] = field(default_factory=dict)  # by site


class Sampler:
    """Draws for the requests in ``slots``; all ranks of ``group`` draw the same."""

    def __init__(self, slots: SlotTable, group: Group = ALONE) -> None:
        self.slots, self.group = slots, group
        self.device = slots.device

    def __call__(self, logits: Tensor, sites: Sites) -> Sampled:
        """Sample every site of ``logits [S, V] float32`` (changed in place) and tell the slots.

        Returns:
            The tokens; ``slots.last_token`` and ``slots.history`` hold them already.
        """
        slots = self.slots
        if slots.tables is not None and sites.masks is None and not slots.odd[sites.slots].any():
            tokens, status = self._draw_by_tables(logits, sites, slots.tables)
            return self._finish(sites, tokens, status)
        finite = change.contain_non_finite(logits)
        reported = np.flatnonzero(slots.logprobs[sites.slots] >= 0)
        raw = logits[self._index(reported)] if len(reported) else None  # a copy
        history = slots.keeps_history[sites.slots]
        if history.any():
            self._record_drafts(sites, history)
        status = torch.where(finite, OK, NON_FINITE).to(torch.uint8)
        errors: dict[int, str] = {}
        if slots.tables is not None:
            self._change_beside_tables(logits, sites, errors)
            tokens, found = self._draw_by_tables(logits, sites, slots.tables)
            status = torch.where(status == OK, found, status)
        else:
            if self._change(logits, sites, errors):
                live = change.live_rows(logits)
                logits.masked_fill_(~live[:, None], 0.0)
                status = torch.where((status == OK) & ~live, DEAD_MASK, status)
            tokens = self._draw(logits, sites)
        if errors:
            status[self._index(np.array(list(errors)))] = PROCESSOR_FAILED
        sampled = self._finish(sites, tokens, status)
        sampled.errors = errors
        if history.any():
            self._record(tokens, sites, history)
        if raw is not None:
            sampled.logprobs = self._logprobs(raw, tokens, reported, sites)
        return sampled

    def _finish(self, sites: Sites, tokens: Tensor, status: Tensor) -> Sampled:
        """Which tokens count, and ``slots.last_token``, which the op over slots has written where no draft was."""
        accepted, row_status, last = self._accept(tokens, status, sites)
        if self.slots.tables is None or last is not tokens:
            row_slots, = upload(self.device, sites.slots[sites.start[:-1]])
            self.slots.last_token[row_slots] = last.int()
        return Sampled(sites, tokens, accepted, row_status)

    def _change_beside_tables(self, logits: Tensor, sites: Sites, errors: dict[int, str]) -> None:
        """What requests ask for that the tables do not hold."""
        slots, of = self.slots, sites.slots
        self._mask(logits, sites)
        for site in np.flatnonzero(slots.has_processors[of]).tolist():
            self._run_processors(logits, site, sites, errors)
        crowded = np.flatnonzero([slots.of(slot).changes > CHANGES for slot in of.tolist()])
        if len(crowded):
            self._bias(logits, crowded, sites)
            self._ban_ids(logits, crowded, sites, sites.positions + 1 - slots.prompt_len[of])
        by_sequences = np.flatnonzero(slots.has_bad_sequences[of])
        if len(by_sequences):
            self._ban_sequences(logits, sites, by_sequences)

    def _draw_by_tables(self, logits: Tensor, sites: Sites, tables: DeviceTables) -> tuple[Tensor, Tensor]:
        """``(tokens [S] int64, status [S] uint8)``."""
        of = sites.slots
        slot_index, positions = send(self.device, of.astype(np.int32), sites.positions.astype(np.int32))
        tokens, status = sample_slots(logits, slot_index, positions, tables.sampling, bool(self.slots.plain[of].all()))
        return tokens.long(), status

    # -- changes to logits, in their order -----------------------------------------------------------------------------

    def _change(self, logits: Tensor, sites: Sites, errors: dict[int, str]) -> bool:
        """Apply all that the sites' requests ask for; whether something may have banned a token."""
        slots, of = self.slots, sites.slots
        draws = sites.positions + 1 - slots.prompt_len[of]
        self._mask(logits, sites)
        processed = np.flatnonzero(slots.has_processors[of])
        for site in processed.tolist():
            self._run_processors(logits, site, sites, errors)
        biased = np.flatnonzero(slots.has_bias[of])
        if len(biased):
            self._bias(logits, biased, sites)
        self._penalise(logits, sites, draws)
        banned = self._ban(logits, sites, draws)
        return sites.masks is not None or len(processed) > 0 or len(biased) > 0 or banned

    def _mask(self, logits: Tensor, sites: Sites) -> None:
        if sites.masks is not None and sites.masked is not None:
            masks, = send(self.device, sites.masks)
            change.apply_masks(logits, self._index(sites.masked), masks)

    def _bias(self, logits: Tensor, chosen: np.ndarray, sites: Sites) -> None:
        """Add the biases of the sites ``chosen``."""
        extras = [self.slots.of(slot) for slot in sites.slots[chosen]]
        self._add(logits, chosen, [e.bias_ids for e in extras], np.concatenate([e.bias_values for e in extras]))

    def _run_processors(self, logits: Tensor, site: int, sites: Sites, errors: dict[int, str]) -> None:
        """The caller's own functions: whatever they raise or return is this site's affair alone.

        They run on the first rank, which alone has them; the others get what came of it.
        """
        if self.group.rank == 0:
            self._run_own(logits, site, sites, errors)
        if self.group.size == 1:
            return
        row = torch.cat((logits[site], logits.new_full((1,), float(site in errors))))
        row = self.group.broadcast(row)
        logits[site] = row[:-1]
        if row[-1]:
            errors.setdefault(site, 'a logits processor of the first rank failed')

    def _run_own(self, logits: Tensor, site: int, sites: Sites, errors: dict[int, str]) -> None:
        slot, position = int(sites.slots[site]), int(sites.positions[site])
        token_ids = self.slots.history[slot, : position + 1].long()
        row = logits[site].clone()
        for processor in self.slots.of(slot).params.logits_processors:
            try:
                row = processor(token_ids, row)
            except Exception as error:  # noqa: BLE001  # foreign code may raise anything; the request carries the reason
                errors[site] = f'{_name(processor)} raised {type(error).__name__}: {error}'
                return
            if not isinstance(row, Tensor) or row.shape != logits[site].shape:
                errors[site] = f'{_name(processor)} must return a tensor of shape {tuple(logits[site].shape)}'
                return
        row = row.to(logits)
        if row.isnan().any() or row.isposinf().any():
            errors[site] = 'a logits processor returned NaN or +inf'
            return
        logits[site] = row

    def _penalise(self, logits: Tensor, sites: Sites, draws: np.ndarray) -> None:
        slots, of = self.slots, sites.slots
        repetition, presence, frequency = slots.repetition[of], slots.presence[of], slots.frequency[of]
        chosen = np.flatnonzero(repetition != 1.0)
        if len(chosen):
            seen, _ = self._seen(chosen, sites, np.zeros(len(chosen), np.int64), sites.positions[chosen] + 1)
            change.penalise_repetition(logits, self._index(chosen), seen, self._real(repetition[chosen]))
        for values in (presence, frequency):
            chosen = np.flatnonzero((values != 0.0) & (draws > 0))
            if not len(chosen):
                continue
            seen, counts = self._seen(chosen, sites, slots.prompt_len[of[chosen]], draws[chosen])
            rows, penalty = self._index(chosen), self._real(values[chosen])
            if values is presence:
                change.penalise_presence(logits, rows, seen, penalty)
            else:
                change.penalise_frequency(logits, rows, seen, counts, penalty)

    def _seen(self, chosen: np.ndarray, sites: Sites, first: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens of the sites' requests from position ``first`` on, ``[b, L] int64``; a short row repeats its last."""
        slot_index, first_, counts_ = upload(self.device, sites.slots[chosen], first, counts)
        columns = torch.arange(int(counts.max()), device=self.device)
        columns = torch.minimum(columns, counts_[:, None] - 1)
        return self.slots.read_history(slot_index, first_, columns), counts_

    def _ban(self, logits: Tensor, sites: Sites, draws: np.ndarray) -> bool:
        slots, of = self.slots, sites.slots
        banned = self._ban_ids(logits, np.arange(len(of)), sites, draws)
        by_sequences = np.flatnonzero(slots.has_bad_sequences[of])
        if len(by_sequences):
            self._ban_sequences(logits, sites, by_sequences)
        return banned or len(by_sequences) > 0

    def _ban_ids(self, logits: Tensor, chosen: np.ndarray, sites: Sites, draws: np.ndarray) -> bool:
        """Ban single tokens at the sites ``chosen``; whether there were any."""
        slots, of = self.slots, sites.slots[chosen]
        by_ids = np.flatnonzero(slots.has_bans[of])
        by_stops = np.flatnonzero(slots.has_stops[of] & (draws[chosen] < slots.min_new_tokens[of]))
        banned = np.concatenate([by_ids, by_stops])
        if len(banned):
            ids = [slots.of(slot).banned_ids for slot in of[by_ids]]
            ids += [slots.of(slot).stop_ids for slot in of[by_stops]]
            self._add(logits, chosen[banned], ids, np.full(sum(map(len, ids)), -np.inf, np.float32))
        return len(banned) > 0

    def _ban_sequences(self, logits: Tensor, sites: Sites, chosen: np.ndarray) -> None:
        """Ban the last token of each bad sequence whose other tokens stand at the end of the site's request."""
        extras = [self.slots.of(slot) for slot in sites.slots[chosen]]
        width = max(e.bad_heads.shape[1] for e in extras)
        owners = np.repeat(chosen, [len(e.bad_tails) for e in extras])
        heads = np.concatenate([np.pad(e.bad_heads, ((0, 0), (width - e.bad_heads.shape[1], 0)), constant_values=-1)
                                for e in extras])
        tails = np.concatenate([e.bad_tails for e in extras])
        first = sites.positions[owners] + 1 - width
        owners_, slot_index, first_, heads_, tails_ = upload(
            self.device, owners, sites.slots[owners], first, heads, tails)
        columns = torch.arange(width, device=self.device).expand(len(owners), width)
        exists = first_[:, None] + columns >= 0
        recent = self.slots.read_history(slot_index, first_, torch.where(exists, columns, -first_[:, None]))
        same = ((recent == heads_) & exists) | (heads_ < 0)
        change.add_at(logits, owners_, tails_, torch.where(same.all(-1), float('-inf'), 0.0))

    def _add(self, logits: Tensor, chosen: np.ndarray, ids: list[np.ndarray], values: np.ndarray) -> None:
        rows, tokens = upload(self.device, np.repeat(chosen, [len(i) for i in ids]), np.concatenate(ids))
        change.add_at(logits, rows, tokens, self._real(values))

    # -- drawing -------------------------------------------------------------------------------------------------------

    def _draw(self, logits: Tensor, sites: Sites) -> Tensor:
        slots, of = self.slots, sites.slots
        greedy = slots.greedy[of]
        if greedy.all():
            return ops.greedy(logits)
        drawn = np.flatnonzero(~greedy)
        of = of[drawn]
        draws = np.maximum(sites.positions[drawn] + 1 - slots.prompt_len[of], 0)
        arguments = (
            self._real(slots.temperature[of]), self._real(slots.top_k[of]), self._real(slots.top_p[of]),
            self._real(slots.min_p[of]), self._real(ops.uniforms(slots.seed[of], draws)),
        )
        if not greedy.any():
            return ops.draw(logits, *arguments)
        tokens = ops.greedy(logits)
        index = self._index(drawn)
        tokens[index] = ops.draw(logits[index], *arguments)
        return tokens

    def _accept(self, tokens: Tensor, status: Tensor, sites: Sites) -> tuple[Tensor, Tensor, Tensor]:
        """A row's sites count from the first up to and including the first whose token is not the draft proposed there.

        Returns:
            ``accepted [b] int64``, ``status [b] uint8`` of the first site that failed among those, ``last [b] int64``:
            the last accepted token.
        """
        counts = np.diff(sites.start)
        if counts.max() == 1:
            return (status == OK).long(), status, tokens
        columns = np.arange(counts.max())
        index = sites.start[:-1, None] + np.minimum(columns, counts[:, None] - 1)
        index_, drafts, there = upload(self.device, index, sites.drafts[index], columns < counts[:, None])
        drawn, fine = tokens[index_], status[index_] == OK
        match = (drawn == drafts) & fine
        reached = torch.cat([torch.ones_like(match[:, :1]), match[:, :-1].cumprod(-1).bool()], -1) & there.bool()
        accepted = (reached & fine).sum(-1)
        row_status = torch.where(reached, status[index_], OK).amax(-1)
        last = drawn.gather(-1, (accepted - 1).clamp(min=0)[:, None]).squeeze(-1)
        return accepted, row_status, last

    # -- what the slots remember, and what is reported -----------------------------------------------------------------

    def _record_drafts(self, sites: Sites, history: np.ndarray) -> None:
        """Draft tokens stand in the history while the sites after them are sampled."""
        drafted = np.flatnonzero(history & (sites.drafts >= 0))
        self.slots.reserve_history(int(sites.positions[history].max()) + 2)
        if len(drafted):
            self.slots.write_history(*upload(
                self.device, sites.slots[drafted], sites.positions[drafted] + 1, sites.drafts[drafted]))

    def _record(self, tokens: Tensor, sites: Sites, history: np.ndarray) -> None:
        """A rejected site's token is written too: beyond the request's end, and overwritten before it is read."""
        kept = np.flatnonzero(history)
        index, slot_index, positions = upload(self.device, kept, sites.slots[kept], sites.positions[kept] + 1)
        self.slots.write_history(slot_index, positions, tokens[index])

    def _logprobs(self, raw: Tensor, tokens: Tensor, reported: np.ndarray, sites: Sites) -> SiteLogprobs:
        normaliser = change.log_normaliser(raw)[:, None]
        wanted = np.minimum(self.slots.logprobs[sites.slots[reported]], raw.shape[-1])
        chosen = raw.gather(-1, tokens[self._index(reported)][:, None])
        values, ids = ops.ranked(raw, int(wanted.max()))
        return SiteLogprobs(
            reported, wanted, (chosen - normaliser).float().squeeze(-1), ids.int(), (values - normaliser).float())

    def _index(self, rows: np.ndarray) -> Tensor:
        return send(self.device, rows)[0]

    def _real(self, values: np.ndarray) -> Tensor:
        return send(self.device, values)[0]


def _name(processor: object) -> str:
    return getattr(processor, '__name__', type(processor).__name__)
