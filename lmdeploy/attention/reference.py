"""The reference backend: plain torch on any device, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionCase, Rotation
from lmdeploy.kv.cache import KVCache, KVLayer
from lmdeploy.ops.paged_attention import attend_last, paged_attention
from lmdeploy.ops.write_kv import write_kv
from lmdeploy.runner.batch import ForwardBatch


class Reference:
    """Refuses nothing and is fast at nothing; the oracle of the others."""

    name = 'reference'
    static = True

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]:
        return []

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> None:
        return None

    def run(self, qkv: Tensor, rotation: Rotation, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        q, k, v = rotation.split(qkv, layer.k.shape[1])
        write_kv.reference(k, v, layer.k, layer.v, batch.kv_slots)
        if batch.static and not batch.host_kv_lens:
            return attend_last(q, layer.k, layer.v, batch.tables(), batch.kv_lens, scale, window).to(v.dtype)
        out = paged_attention.reference(q, layer.k, layer.v, batch.tables(), batch.host_query_start,
                                        batch.host_kv_lens, scale, window)  # fmt: skip
        return out.to(v.dtype)
