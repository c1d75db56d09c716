"""The CPU backend: cache writes as row copies, attention over tiles and spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionCase, Rotation
from lmdeploy.kv.cache import KVCache, KVLayer
from lmdeploy.ops.cpu.paged_attention import attend
from lmdeploy.ops.cpu.spans import Chunk, Shape, build_chunks
from lmdeploy.ops.cpu.write_kv import row_index, write_code_rows, write_rows
from lmdeploy.runner.batch import ForwardBatch


@dataclass(slots=True)
class CPUPlan:
    """A step's cache rows, and its chunks by window."""

    rows: Tensor
    chunks: dict[int, list[Chunk]]


class CPUSpans:
    """Bits of a row depend on that row alone; see :mod:`lmdeploy.ops.cpu.paged_attention`."""

    name = 'cpu_spans'
    static = False
    bits: tuple[int, ...] = (0, 8, 4)

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]:
        return [] if device.type == 'cpu' else [f'runs on cpu, not on {device.type}']

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> CPUPlan:
        shape = Shape(case.heads, case.kv_heads, case.head_dim, kv.block_size)
        chunks = {
            window: build_chunks(batch.host_query_start, batch.host_kv_lens, batch.block_table, shape, window)
            for window in case.windows
        }
        return CPUPlan(row_index(batch.kv_slots, case.kv_heads, kv.block_size), chunks)

    def run(self, qkv: Tensor, rotation: Rotation, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        plan: CPUPlan = batch.plan
        q, k, v = rotation.split(qkv, layer.k.shape[1])
        if layer.k_scales is None:
            write_rows(k, v, layer.k, layer.v, plan.rows)
        else:
            write_code_rows(k, v, layer, plan.rows, rotation.basis)
        return attend(q, layer, plan.chunks[window], scale, v.dtype, rotation.offset,
                      rotation.basis)  # fmt: skip
