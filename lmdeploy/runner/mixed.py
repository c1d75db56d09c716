"""MixedGraphs: short prompts and chunks, with the decodes beside them, as recorded steps.

A small step takes the host longer to launch than the device to run. What :mod:`lmdeploy.runner.graphs` does for decodes
is done here for steps of D rows with one token each and up to ``CHUNKS`` rows with T tokens in all, rounded up to
buckets of D and T. A recorded step reads, from one static buffer, token by token and row by row what the eager runner's
batch holds; blocks are appended before it. Rows that draw nothing draw for the scratch slot.

Padding decodes run in the scratch slot; padding tokens belong to no row and are written to the null block; padding
chunks have no tokens.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lmdeploy.engine.plan import OUTPUT_ALL, StepPlan, StepResult
from lmdeploy.kv.cache import KVCache
from lmdeploy.log import get_logger
from lmdeploy.models.registry import CausalLM
from lmdeploy.ops.slots import chunk_inputs, keep_results, sample_slots
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.runner.graphs import RING, Download, Kind, Record, Replay
from lmdeploy.runner.slots import SlotTable

CHUNKS = 32  # rows with more than one token
TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DECODES = (0, 8, 32, 64, 128, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class Key:
    """A graph: its buckets, and whether all its rows are greedy."""

    decodes: int
    tokens: int
    kind: Kind

    @property
    def rows(self) -> int:
        return self.decodes + CHUNKS

    @property
    def all_tokens(self) -> int:
        return self.decodes + self.tokens


class MixedGraphs:
    """Serves the steps with a few short chunks.

    Args:
        slots: with device tables.
        max_batch: the most rows of a step.
        record: makes the graphs, in the memory pool of the others.
        most_tokens: the device runs larger steps no faster than the host launches them.
    """

    def __init__(self, model: CausalLM, kv: KVCache, slots: SlotTable, max_batch: int, record: Record,
                 most_tokens: int) -> None:
        assert slots.tables is not None
        self.model, self.kv, self.slots, self.tables, self.record = model, kv, slots, slots.tables, record
        self.device, self.most_tokens = slots.device, most_tokens
        self.decodes = [size for size in DECODES if size < max_batch] + [max_batch]
        on_gpu = self.device.type != 'cpu'
        rows, tokens = max_batch + CHUNKS, max_batch + TOKENS[-1]
        size = 3 * tokens + 6 * rows + 2
        self._inputs = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._staged = [torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(RING)]
        self._arrays = [staged.numpy() for staged in self._staged]
        self._results = torch.zeros(RING, 2 * rows, dtype=torch.int32, device=self.device)
        self._downloads = [Download(2 * rows, on_gpu) for _ in range(RING)]
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._graphs: dict[Key, Replay] = {}
        self._given_up: set[Key] = set()
        self._turn = 0

    def find(self, plan: StepPlan) -> Key | None:
        """The graph that runs ``plan``, recorded now if it is not there yet and there is memory for it."""
        slots, decodes = self.slots, leading_decodes(plan)
        chunks, tokens = plan.rows - decodes, plan.num_tokens - decodes
        if (chunks > CHUNKS or tokens > TOKENS[-1] or plan.masks is not None or plan.drafts.any()
                or (plan.outputs == OUTPUT_ALL).any() or slots.odd[plan.slots].any()
                or (plan.starts < slots.turns_end[plan.slots]).any()):
            return None
        kind = Kind.GREEDY if slots.plain[plan.slots].all() else Kind.SAMPLED
        key = Key(self.decodes[bisect_left(self.decodes, decodes)], TOKENS[bisect_left(TOKENS, tokens)], kind)
        if key in self._given_up or key.all_tokens > self.most_tokens:
            return None
        try:
            self._graph(key)
        except torch.OutOfMemoryError:
            self._given_up.add(key)
            return None
        return key

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the graphs of greedy steps, the largest first; the others are recorded when they first come."""
        begin = time.perf_counter()
        keys = [Key(decodes, tokens, Kind.GREEDY) for decodes in self.decodes for tokens in TOKENS]
        for key in sorted(keys, key=lambda key: -key.all_tokens):
            if key.all_tokens <= self.most_tokens:
                self._graph(key)
        get_logger().info('recorded %d graphs of chunks in %.1f s', len(self._graphs), time.perf_counter() - begin)

    def launch(self, key: Key, plan: StepPlan) -> MixedStep:
        """Launch the step of ``plan``, whose slots are open and whose blocks are appended."""
        turn, self._turn = self._turn, (self._turn + 1) % RING
        download = self._downloads[turn]
        download.wait()
        array = self._fill(key, plan, self._arrays[turn])
        used = len(array)
        array[used - 1] = turn
        self._inputs[:used].copy_(self._staged[turn][:used], non_blocking=True)
        self._graphs[key]()
        download.start(self._results[turn], 2 * key.rows, self._stream)
        decodes = leading_decodes(plan)
        places = np.concatenate([np.arange(decodes), key.decodes + np.arange(plan.rows - decodes)])
        return MixedStep(plan.step, plan.sample, places, key.rows, download)

    def _graph(self, key: Key) -> None:
        """Record the graph ``key`` if it is not there."""
        if key not in self._graphs:
            staged = torch.from_numpy(self._fill(key, None, np.zeros(self._inputs.numel(), np.int32)))
            self._inputs[: len(staged)].copy_(staged)
            self._graphs[key] = self.record(self._step(key))

    def _fill(self, key: Key, plan: StepPlan | None, array: np.ndarray) -> np.ndarray:
        """Write what the step of ``plan`` needs (None: of nothing) to the beginning of ``array``; returns that part.

        By token: ids, positions, slots. By row: slot, cached tokens, output token, slot that is drawn for, its
        position; then the starts of the queries and one number for the turn.
        """
        rows, tokens, scratch = key.rows, key.all_tokens, self.tables.size
        used = array[: 3 * tokens + 6 * rows + 2]
        by_token = used[: 3 * tokens].reshape(3, tokens)
        by_row = used[3 * tokens : 3 * tokens + 5 * rows].reshape(5, rows)
        query_start = used[3 * tokens + 5 * rows : -1]
        by_token[:2], by_token[2] = 0, scratch
        by_row[:] = 0
        by_row[0], by_row[3] = scratch, scratch
        by_row[1, : key.decodes] = 1
        query_start[: key.decodes + 1] = np.arange(key.decodes + 1)
        query_start[key.decodes + 1 :] = key.decodes
        by_row[2, : key.decodes] = np.arange(key.decodes)
        if plan is None:
            return used
        decodes, total = leading_decodes(plan), plan.num_tokens
        chunks = plan.rows - decodes
        lengths = np.diff(plan.query_start)
        row_of = np.repeat(np.arange(plan.rows), lengths)
        positions = np.arange(total) - plan.query_start[row_of] + plan.starts[row_of]
        token_places = np.arange(total)
        token_places[decodes:] += key.decodes - decodes
        row_places = np.arange(plan.rows)
        row_places[decodes:] += key.decodes - decodes
        by_token[0, token_places] = plan.tokens
        by_token[1, token_places] = positions
        by_token[2, token_places] = plan.slots[row_of]
        last = plan.query_start[1:] - 1
        by_row[0, row_places] = plan.slots
        by_row[1, row_places] = plan.starts + lengths
        by_row[2, row_places] = token_places[last]
        by_row[3, row_places] = np.where(plan.sample, plan.slots, scratch)
        by_row[4, row_places] = positions[last]
        if chunks:
            ends = key.decodes + np.cumsum(lengths[decodes:])
            query_start[key.decodes + 1 : key.decodes + 1 + chunks] = ends
            query_start[key.decodes + 1 + chunks :] = ends[-1]
        return used

    def _step(self, key: Key) -> Callable[[], None]:
        """The function of one graph: all it reads and writes is static."""
        rows, tokens, tables, size = key.rows, key.all_tokens, self.tables, self.slots.block_size
        used = self._inputs[: 3 * tokens + 6 * rows + 2]
        by_token, by_row = used[: 3 * tokens].view(3, tokens), used[3 * tokens : 3 * tokens + 5 * rows].view(5, rows)
        starts, turn = used[3 * tokens + 5 * rows : -1], used[-1:]
        max_kv = min(tables.blocks.shape[1] * size, self.slots.session_len)

        def step() -> None:
            token_ids, positions, kv_slots, row_slots, kv_lens, query_start, outputs, drawing, at = chunk_inputs(
                by_token, by_row, starts, tables.blocks, tables.sampling.last_token, size)
            turned = positions + tables.shift[by_token[2]] if self.slots.mrope else positions
            batch = ForwardBatch(
                token_ids=token_ids, positions=turned, kv_slots=kv_slots, query_start=query_start, kv_lens=kv_lens,
                block_table=tables.blocks, output_rows=outputs, max_query=key.tokens, max_kv=max_kv,
                host_query_start=[], host_kv_lens=[], table_rows=row_slots, num_decode=key.decodes, static=True)
            if self.device.type == 'cpu':  # nothing is recorded there, and its layers ask the host
                batch.host_query_start, batch.host_kv_lens = query_start.tolist(), kv_lens.tolist()
                batch.block_table, batch.table_rows = batch.tables(), torch.arange(rows, dtype=torch.int32)
            logits = self.model.logits(self.model(batch, self.kv))
            drawn, status = sample_slots(logits, drawing, at, tables.sampling, key.kind is Kind.GREEDY)
            keep_results(self._results, turn, drawn, status)

        return step


def leading_decodes(plan: StepPlan) -> int:
    """How many rows at the beginning of ``plan`` have one token."""
    longer = np.flatnonzero(np.diff(plan.query_start) != 1)
    return int(longer[0]) if len(longer) else plan.rows


@dataclass(slots=True)
class MixedStep:
    """A launched graph; implements the executor's ``StepHandle``. Row i's results are at ``places[i]`` of ``rows``."""

    step: int
    sample: np.ndarray
    places: np.ndarray
    rows: int
    download: Download

    def result(self) -> StepResult:
        """Wait for the copy of the step's tokens, and for nothing else."""
        found = self.download.wait()
        tokens, status = found[self.places], found[self.rows + self.places].astype(np.uint8)
        status[~self.sample] = 0
        good = self.sample & (status == 0)
        start = np.zeros(len(good) + 1, np.int32)
        np.cumsum(good, out=start[1:])
        return StepResult(self.step, status, start, tokens[good])
