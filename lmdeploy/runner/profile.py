"""Steps of nothing at the start: what the largest one takes, before the KV cache is given the memory that is left, and
all kinds of them, so that nothing is compiled while requests wait."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lmdeploy.engine.plan import OUTPUT_LAST, StepPlan
from lmdeploy.kv.cache import KVCache
from lmdeploy.models.registry import CausalLM
from lmdeploy.ops.logits import log_normaliser
from lmdeploy.ops.sample import ranked
from lmdeploy.ops.slots import sample_slots
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.runner.graphs import buckets
from lmdeploy.runner.memory import MemoryPlan
from lmdeploy.runner.slots import SlotTable


def peak_bytes(model: CausalLM, slots: SlotTable, plan: MemoryPlan, dtype: torch.dtype) -> int:
    """Bytes of a GPU that the largest step takes beside weights and cache, with what the allocator rounds up.

    The step runs twice, so that what is compiled or allocated once and for all is not counted.
    """
    kv = KVCache(model.kv_shape, 1, slots.block_size, dtype, slots.device)
    largest_step(model, kv, slots, plan)
    torch.cuda.synchronize(slots.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(slots.device)
    torch.cuda.reset_peak_memory_stats(slots.device)
    largest_step(model, kv, slots, plan)
    torch.cuda.synchronize(slots.device)
    peak = torch.cuda.max_memory_reserved(slots.device) - before
    del kv
    torch.cuda.empty_cache()
    return peak


@torch.inference_mode()
def largest_step(model: CausalLM, kv: KVCache, slots: SlotTable, plan: MemoryPlan) -> None:
    """A prefill of as many tokens as a step may have, and a draw for as many rows as a batch may have, in which all
    tokens lie in the null block and all rows in the scratch slot."""
    assert slots.tables is not None
    device, tokens = slots.device, plan.max_step_tokens
    length = min(tokens, plan.session_len)
    lengths = [min(length, tokens - at) for at in range(0, tokens, length)]
    start = [0]
    for count in lengths:
        start.append(start[-1] + count)
    positions = torch.cat([torch.arange(count, dtype=torch.int32, device=device) for count in lengths])
    batch = ForwardBatch(
        token_ids=torch.zeros(tokens, dtype=torch.int32, device=device),
        positions=positions,
        kv_slots=(positions % slots.block_size).long(),
        query_start=torch.tensor(start, dtype=torch.int32, device=device),
        kv_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=torch.zeros(len(lengths), -(-length // slots.block_size), dtype=torch.int32, device=device),
        output_rows=torch.arange(len(lengths), device=device),
        max_query=length,
        max_kv=length,
        host_query_start=start,
        host_kv_lens=lengths,
    )
    hidden = model(batch, kv)
    rows = plan.max_batch_size
    drawn = hidden[torch.zeros(rows, dtype=torch.int64, device=device)]
    scratch = torch.full((rows,), slots.tables.size, dtype=torch.int32, device=device)
    sample_slots(model.logits(drawn), scratch, torch.zeros_like(scratch), slots.tables.sampling, False)


def idle_plan(scratch: int, decodes: int, chunks: tuple[int, ...]) -> StepPlan:
    """A step of so many decodes and of chunks of these lengths, all of them in the scratch slot, that draws."""
    lengths = np.array([1] * decodes + list(chunks))
    rows, start = len(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return StepPlan(
        step=0,
        slots=np.full(rows, scratch, np.int32),
        starts=np.zeros(rows, np.int32),
        query_start=start,
        tokens=np.zeros(start[-1], np.int32),
        block_start=np.zeros(rows + 1, np.int32),
        blocks=np.zeros(0, np.int32),
        outputs=np.full(rows, OUTPUT_LAST, np.uint8),
        sample=np.ones(rows, bool),
        drafts=np.zeros(rows, np.int32),
    )


def idle_plans(plan: MemoryPlan, scratch: int, recorded: bool) -> Iterator[StepPlan]:
    """Steps that together need every kernel that a step may need, in all their variants.

    Which one runs depends on how many tokens there are, on how long a chunk is, and on how many rows decode.

    Args:
        recorded: decodes of every number run anyway, when their graphs are recorded.
    """
    most = min(plan.max_step_tokens, plan.session_len)
    for decodes in (0, 1, min(20, plan.max_batch_size - 1), plan.max_batch_size - 1):
        for length in (2, 17, 40, 100, 200, 400, 900, 2000, most):
            if 0 < length <= most and decodes + length <= plan.max_step_tokens:
                yield idle_plan(scratch, decodes, (length,))
    for decodes in (1, 3) if recorded else buckets(plan.max_batch_size):
        yield idle_plan(scratch, decodes, ())
    several = min(20, plan.max_batch_size)
    yield idle_plan(scratch, 0, (max(1, min(most, plan.max_step_tokens // several)),) * several)


def idle_report(slots: SlotTable, vocab_size: int) -> None:
    """What log-probabilities need beside the kernels of every step: no plan asks for them, but a request may."""
    logits = torch.zeros(1, vocab_size, device=slots.device)
    log_normaliser(logits)
    ranked(logits, 1)
