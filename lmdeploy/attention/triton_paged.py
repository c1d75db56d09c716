"""The GPU backend: rotation and cache write in one kernel, decode rows and prompt chunks by a kernel each.

Life: the first :meth:`TritonPaged.prepare` on a device allocates the workspace that all layers and steps share; graphs
keep its address, so a step must run once before it is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionCase, Rotation
from lmdeploy.kv.cache import KVCache, KVLayer
from lmdeploy.ops.devices import refuse_triton
from lmdeploy.ops.rope import rope_write_kv
from lmdeploy.runner.batch import ForwardBatch

if TYPE_CHECKING:
    from lmdeploy.ops.triton.paged_attention_decode import DecodePlan, Workspace

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256


@dataclass(frozen=True, slots=True)
class Division:
    """A step's division of the decode rows' work, by window; empty where no row decodes."""

    plans: dict[int, DecodePlan]
    workspace: Workspace | None


class TritonPaged:
    """Every grid depends on the batch's size alone, so that it serves recorded steps."""

    name = 'triton_paged'
    static = True

    def __init__(self) -> None:
        self._workspaces: dict[tuple[torch.device, int, int], Workspace] = {}

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]:
        reasons = refuse_triton(device)
        if dtype not in DTYPES:
            reasons.append(f'no {dtype}')
        if case.head_dim > LARGEST_HEAD:
            reasons.append(f'heads of {case.head_dim} channels are larger than {LARGEST_HEAD}')
        return reasons

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> Division:
        if not batch.num_decode:
            return Division({}, None)
        from lmdeploy.ops.triton import paged_attention_decode as decode
        from lmdeploy.ops.triton.launch import multiprocessors

        device, group, rows = batch.device, case.heads // case.kv_heads, batch.num_decode
        config = decode.config_of(case.head_dim, kv.layer(0).k.element_size(), rows * case.kv_heads)
        processors = multiprocessors(device)
        programs = config.per_sm * processors
        key = device, group, case.head_dim
        workspace = self._workspaces.get(key)
        if workspace is None:
            workspace = self._workspaces[key] = decode.make_workspace(
                decode.MOST_PER_SM * processors, group, case.head_dim, device)
        rows_of = batch.kv_lens[:rows], batch.query_start, batch.table_rows
        plans = {window: decode.plan_decode(*rows_of, case.kv_heads, window, programs, config)
                 for window in case.windows}  # fmt: skip
        return Division(plans, workspace)

    def run(self, qkv: Tensor, rotation: Rotation, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        from lmdeploy.ops.triton.paged_attention_decode import decode_attention
        from lmdeploy.ops.triton.paged_attention_prefill import prefill_attention

        q = rope_write_kv(qkv, rotation.cos, rotation.sin, rotation.q_weight, rotation.k_weight, rotation.eps, layer.k,
                          layer.v, batch.kv_slots)
        out = torch.empty_like(q)
        division, decoding = batch.plan, batch.num_decode
        if decoding:
            decode_attention(q, layer.k, layer.v, batch.block_table, batch.table_rows, batch.query_start,
                             batch.kv_lens[:decoding], division.plans[window], division.workspace, out, scale, window)
        if decoding < batch.num_rows:
            prefill_attention(q, layer.k, layer.v, batch.block_table, batch.table_rows, batch.query_start,
                              batch.kv_lens, decoding, batch.num_rows - decoding, batch.num_tokens - decoding, out,
                              scale, window)
        return out
