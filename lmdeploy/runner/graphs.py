"""GraphRunner: a whole decode step, from slots and positions to drawn tokens, recorded per batch size and replayed.

A recorded step reads everything that changes from one static buffer: per row its slot, its position, its token (or
that the device knows it) and a new block, in one copy of a few hundred bytes from pinned memory. The rest lies in the
tables of the slots. What it draws goes to a ring of result rows, from which a stream of its own copies to the host, so
that the next step never waits for a copy.

Batches are rounded up to a *bucket*; padding rows run in the scratch slot on the null block. Graphs are recorded from
the largest bucket down and share one memory pool: they run one after the other, so that all need no more memory than
the largest.

A bucket has graphs of three kinds: GREEDY and SAMPLED are whole steps, the former without the work that greedy rows
do not need; FORWARD ends with the logits, for steps in which a row asks for more than the tables hold (a grammar, a
logits processor, log-probabilities).
"""

from __future__ import annotations

import enum
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.kv.cache import KVCache
from lmdeploy.log import get_logger
from lmdeploy.models.registry import CausalLM
from lmdeploy.ops.slots import decode_inputs, keep_results, sample_slots
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.runner.slots import SlotTable

SAMPLED_AT_START = 8  # rows; larger sampled steps are recorded when they first come, which takes some 50 ms
RING = 4  # steps whose inputs and results have memory of their own: more than are ever launched and not retired

Replay = Callable[[], None]


class Kind(enum.Enum):
    """Where a graph ends, and what it does before."""

    GREEDY = 'greedy'
    SAMPLED = 'sampled'
    FORWARD = 'forward'


Key = tuple[int, Kind]


class Record(Protocol):
    """Makes a step that can be run again and again out of a function that works on static memory only."""

    def __call__(self, step: Callable[[], None]) -> Replay: ...


class CudaGraphs:
    """Records on a GPU. All graphs share a memory pool and must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], None]) -> Replay:
        """Run ``step`` once, which compiles and allocates whatever is done once, then record it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            step()
            self._stream.synchronize()
            # other threads of the program may use the device meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode='thread_local')
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay


def rerun(step: Callable[[], None]) -> Replay:
    """Record nothing and run the function itself: static memory and buckets without a GPU."""
    return step


def buckets(most: int) -> list[int]:
    """The batch sizes that have graphs: 1, 2, 4, then steps of 8 to 256 and of 16 beyond; the last is ``most``."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max(most, 272) + 1, 16)]
    return [size for size in sizes if size < most] + [most]


class GraphRunner:
    """Serves the steps in which every row has one token and draws one.

    Args:
        slots: with device tables.
        max_batch: the most rows of a step.
        record: makes the graphs.
    """

    def __init__(self, model: CausalLM, kv: KVCache, slots: SlotTable, max_batch: int, record: Record) -> None:
        assert slots.tables is not None
        self.model, self.kv, self.slots, self.tables, self.record = model, kv, slots, slots.tables, record
        self.buckets = buckets(max_batch)
        self.device = slots.device
        on_gpu = self.device.type != 'cpu'
        size = 4 * max_batch + 1
        self._inputs = torch.zeros(size, dtype=torch.int32, device=self.device)
        # a graph keeps no tensor alive: what it reads belongs to the runner
        self._query_start = torch.arange(max_batch + 1, dtype=torch.int32, device=self.device)
        self._output_rows = torch.arange(max_batch, device=self.device)
        self._staged = [torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(RING)]
        self._arrays = [staged.numpy() for staged in self._staged]
        self._results = torch.zeros(RING, 2 * max_batch, dtype=torch.int32, device=self.device)
        self._downloads = [Download(2 * max_batch, on_gpu) for _ in range(RING)]
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._logits: Tensor | None = None  # [max_batch, V] float32 of FORWARD graphs, once there are any
        self._graphs: dict[Key, Replay] = {}
        self._given_up: set[Key] = set()
        self._turn = 0
        self._timed: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] | None = None

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the graphs of greedy steps, the largest first, and those of small sampled ones."""
        begin = time.perf_counter()
        for bucket in reversed(self.buckets):
            self._graph((bucket, Kind.GREEDY))
            if bucket <= SAMPLED_AT_START:
                self._graph((bucket, Kind.SAMPLED))
        get_logger().info('recorded %d decode graphs in %.1f s', len(self._graphs), time.perf_counter() - begin)

    def find(self, plan: StepPlan) -> Key | None:
        """The graph that runs ``plan``; one that is first needed is recorded now, if there is memory for it."""
        rows, slots = plan.rows, self.slots
        if (plan.num_tokens != rows or rows > self.buckets[-1] or not plan.sample.all() or plan.drafts.any()
                or slots.hidden_rows[plan.slots].any()):
            return None
        kind = Kind.GREEDY if slots.plain[plan.slots].all() else Kind.SAMPLED
        if plan.masks is not None or slots.odd[plan.slots].any():
            kind = Kind.FORWARD
        key = self.buckets[bisect_left(self.buckets, rows)], kind
        if key in self._given_up:
            return None
        try:
            self._graph(key)
        except torch.OutOfMemoryError:
            get_logger().warning('there is no memory for a graph of %d rows: such steps run without one', key[0])
            self._given_up.add(key)
            return None
        return key

    def launch(self, key: Key, plan: StepPlan) -> GraphStep:
        """Launch all of ``plan``'s step; its slots are open and its blocks not yet appended. Not for FORWARD graphs."""
        turn = self._send(key[0], plan)
        self._replay(key)
        download = self._downloads[turn]
        download.start(self._results[turn], 2 * key[0], self._stream)
        return GraphStep(plan.step, plan.rows, key[0], download)

    def forward(self, key: Key, plan: StepPlan) -> Callable[[], Tensor]:
        """As :meth:`launch`, for a FORWARD graph: what runs it, as often as needed, and gives the logits ``[B, V]``.

        They are valid, and may be changed, until the next one runs.
        """
        self._send(key[0], plan)

        def run() -> Tensor:
            self._replay(key)
            assert self._logits is not None
            return self._logits[: plan.rows]

        return run

    def time(self, on: bool) -> list[tuple[int, float]]:
        """Start or stop to time every graph on the device; (bucket, milliseconds) of those since the last call."""
        torch.cuda.synchronize()
        found = [(bucket, begin.elapsed_time(end)) for bucket, begin, end in self._timed or []]
        self._timed = [] if on else None
        return found

    def _send(self, bucket: int, plan: StepPlan) -> int:
        """Send what the step of ``plan`` needs; the row of the ring that it uses."""
        rows = plan.rows
        turn, self._turn = self._turn, (self._turn + 1) % RING
        self._downloads[turn].wait()
        array = self._arrays[turn]
        packed = array[: 4 * bucket].reshape(4, bucket)
        packed[0, :rows], packed[1, :rows], packed[2, :rows] = plan.slots, plan.starts, plan.tokens
        packed[3, :rows] = self._new_blocks(plan)
        if rows < bucket:
            packed[0, rows:] = self.tables.size
            packed[1:, rows:] = 0
        array[4 * bucket] = turn
        used = 4 * bucket + 1
        self._inputs[:used].copy_(self._staged[turn][:used], non_blocking=True)
        return turn

    def _replay(self, key: Key) -> None:
        if self._timed is None:
            self._graphs[key]()
            return
        marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        marks[0].record()
        self._graphs[key]()
        marks[1].record()
        self._timed.append((key[0], *marks))

    def _new_blocks(self, plan: StepPlan) -> np.ndarray | int:
        """``[B] int32``: the new block of each row, or 0. Blocks that a graph does not expect are appended here."""
        if not len(plan.blocks):
            return 0
        counts = np.diff(plan.block_start)
        have = self.slots.num_blocks[plan.slots]
        if counts.max() > 1 or ((counts > 0) & (have != plan.starts // self.slots.block_size)).any():
            self.slots.append(plan.slots, plan.block_start, plan.blocks)
            return 0
        new = np.zeros(plan.rows, np.int32)
        new[counts > 0] = plan.blocks
        self.slots.num_blocks[plan.slots] += counts
        return new

    def _graph(self, key: Key) -> None:
        """Record the graph ``key`` if it is not there."""
        if key in self._graphs:
            return
        bucket, kind = key
        if kind is Kind.FORWARD and self._logits is None:
            self._logits = torch.empty(self.buckets[-1], self.model.config.vocab_size, device=self.device)
        idle = self._inputs[: 4 * bucket].view(4, bucket)
        idle.zero_()
        idle[0] = self.tables.size
        self._graphs[key] = self.record(self._step(bucket, kind))

    def _step(self, bucket: int, kind: Kind) -> Callable[[], None]:
        """The function of one graph: all it reads and writes is static."""
        packed, turn = self._inputs[: 4 * bucket].view(4, bucket), self._inputs[4 * bucket : 4 * bucket + 1]
        size = self.slots.block_size
        tables = self.tables
        max_kv = min(tables.blocks.shape[1] * size, self.slots.session_len)
        query_start, output_rows = self._query_start[: bucket + 1], self._output_rows[:bucket]

        def step() -> None:
            token_ids, positions, kv_slots, kv_lens = decode_inputs(
                packed, tables.blocks, tables.sampling.last_token, size)
            turned = positions + tables.shift[packed[0]] if self.slots.mrope else positions
            batch = ForwardBatch(
                token_ids=token_ids, positions=turned, kv_slots=kv_slots, query_start=query_start, kv_lens=kv_lens,
                block_table=tables.blocks, output_rows=output_rows, max_query=1, max_kv=max_kv, host_query_start=[],
                host_kv_lens=[], table_rows=packed[0], num_decode=bucket, static=True)
            if self.device.type == 'cpu':  # nothing is recorded there, and its layers ask the host
                batch.host_query_start, batch.host_kv_lens = query_start.tolist(), kv_lens.tolist()
                batch.block_table, batch.table_rows = batch.tables(), output_rows.int()
            logits = self.model.logits(self.model(batch, self.kv))
            if kind is Kind.FORWARD:
                assert self._logits is not None
                self._logits[:bucket].copy_(logits)
                return
            tokens, status = sample_slots(logits, packed[0], positions, tables.sampling, kind is Kind.GREEDY)
            keep_results(self._results, turn, tokens, status)

        return step


class Download:
    """One row of results on its way to the host."""

    def __init__(self, size: int, on_gpu: bool) -> None:
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._array = self._host.numpy()
        self._computed = torch.cuda.Event() if on_gpu else None
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._pending = False

    def start(self, row: Tensor, count: int, stream: torch.cuda.Stream | None) -> None:
        """Copy ``row[:count]`` when what is launched so far has run."""
        if stream is None or self._computed is None or self._arrived is None:
            self._host[:count] = row[:count]
            return
        self._computed.record()
        self._computed.wait(stream)
        with torch.cuda.stream(stream):
            self._host[:count].copy_(row[:count], non_blocking=True)
            self._arrived.record(stream)
        self._pending = True

    def wait(self) -> np.ndarray:
        """The row, when it is there."""
        if self._pending and self._arrived is not None:
            self._arrived.synchronize()
            self._pending = False
        return self._array


@dataclass(slots=True)
class GraphStep:
    """A launched graph; implements the executor's ``StepHandle``. Its result is read before ``RING`` more steps."""

    step: int
    rows: int
    bucket: int
    download: Download

    def result(self) -> StepResult:
        """Wait for the copy of the step's tokens, and for nothing else."""
        row = self.download.wait()
        tokens, status = row[: self.rows].copy(), row[self.bucket : self.bucket + self.rows].astype(np.uint8)
        start = np.arange(self.rows + 1, dtype=np.int32)
        if status.any():
            np.cumsum(status == 0, out=start[1:])
            tokens = tokens[status == 0]
        return StepResult(self.step, status, start, tokens)
