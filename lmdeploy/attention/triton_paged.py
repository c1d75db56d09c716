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
from lmdeploy.ops.kv_codes import rope_write_codes
from lmdeploy.ops.rope import rope_write_kv
from lmdeploy.runner.batch import ForwardBatch

if TYPE_CHECKING:
    from lmdeploy.ops.triton.paged_attention_decode import DecodePlan, Workspace
    from lmdeploy.ops.triton.paged_attention_prefill import PrefillPlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD, LARGEST_GROUP = 256, 32


@dataclass(frozen=True, slots=True)
class Division:
    """A step's division of work: of the rows that decode, by window, and of the others."""

    decodes: dict[int, DecodePlan]
    prompts: PrefillPlan | None
    workspace: Workspace | None


class TritonPaged:
    """Every grid depends on the batch's size alone, so that it serves recorded steps."""

    name = 'triton_paged'
    static = True
    bits: tuple[int, ...] = (0, 8, 4)

    def __init__(self) -> None:
        self._workspaces: dict[tuple[torch.device, int, int], Workspace] = {}

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]:
        reasons = refuse_triton(device)
        if dtype not in DTYPES:
            reasons.append(f'no {dtype}')
        if case.head_dim > LARGEST_HEAD:
            reasons.append(f'heads of {case.head_dim} channels are larger than {LARGEST_HEAD}')
        if case.bits and case.head_dim % 4:
            reasons.append(f'codes of heads of {case.head_dim} channels do not fill words')
        if case.heads // case.kv_heads > LARGEST_GROUP:
            reasons.append(f'more than {LARGEST_GROUP} query heads to a key head')
        return reasons

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> Division:
        from lmdeploy.ops.triton import paged_attention_decode as decode
        from lmdeploy.ops.triton import paged_attention_prefill as prefill
        from lmdeploy.ops.triton.launch import multiprocessors

        group, dim, size = case.heads // case.kv_heads, case.head_dim, kv.layer(0).k.element_size()
        decoding, others = batch.num_decode, batch.num_rows - batch.num_decode
        decodes, prompts, workspace = {}, None, None
        if decoding:
            processors = multiprocessors(batch.device)
            config = decode.config_of(dim, size, decoding * case.kv_heads, case.bits)
            workspace = self._workspaces.get((batch.device, group, dim))
            if workspace is None:
                workspace = decode.make_workspace(decode.MOST_PER_SM * processors, group, dim, batch.device)
                self._workspaces[batch.device, group, dim] = workspace
            for window in case.windows:
                decodes[window] = decode.plan_decode(batch.kv_lens[:decoding], batch.query_start, batch.table_rows,
                                                     case.kv_heads, window, config.per_sm * processors, config)
        if others:
            launch = prefill.config_of(dim, size, case.bits, case.offset)
            prompts = prefill.plan_prefill(batch.query_start, batch.kv_lens, batch.table_rows, decoding, others,
                                           batch.num_tokens - decoding, group, launch)
        return Division(decodes, prompts, workspace)

    def run(self, qkv: Tensor, rotation: Rotation, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        from lmdeploy.ops.triton.paged_attention_decode import decode_attention
        from lmdeploy.ops.triton.paged_attention_prefill import prefill_attention

        plain = None
        if layer.k_scales is None:
            q = rope_write_kv(qkv, rotation.cos, rotation.sin, rotation.q_weight, rotation.k_weight, rotation.eps,
                              layer.k, layer.v, batch.kv_slots)  # fmt: skip
        else:
            values = None if rotation.offset is None else rotation.offset.values
            q, plain = rope_write_codes(qkv, rotation.cos, rotation.sin, rotation.q_weight, rotation.k_weight,
                                        rotation.eps, values, rotation.basis, layer, batch.kv_slots)  # fmt: skip
        out = torch.empty_like(q)
        plan: Division = batch.plan
        if plan.workspace is not None:
            decode_attention(q, layer, batch.block_table, batch.table_rows, batch.query_start, batch.kv_lens,
                             plan.decodes[window], plan.workspace, out, scale, window, plain, rotation.offset)
        if plan.prompts is not None:
            prefill_attention(q, layer, batch.block_table, plan.prompts, out, scale, window, plain, rotation.offset)
        return out
