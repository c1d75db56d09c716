"""What the largest step takes: run once on nothing, before the memory that is left is given to the KV cache."""

from __future__ import annotations

import torch

from lmdeploy.kv.cache import KVCache
from lmdeploy.models.registry import CausalLM
from lmdeploy.ops.slots import sample_slots
from lmdeploy.runner.batch import ForwardBatch
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
