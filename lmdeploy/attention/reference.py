"""The reference backend: plain torch on any device, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionCase
from lmdeploy.kv.cache import KVCache, KVLayer
from lmdeploy.ops.paged_attention import paged_attention
from lmdeploy.ops.write_kv import write_kv
from lmdeploy.runner.batch import ForwardBatch


class Reference:
    """Refuses nothing and is fast at nothing; the oracle of the others."""

    name = 'reference'
    static = False

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]:
        return []

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> None:
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        write_kv.reference(k, v, layer.k, layer.v, batch.kv_slots)
        out = paged_attention.reference(q, layer.k, layer.v, batch.tables(), batch.host_query_start,
                                        batch.host_kv_lens, scale, window)  # fmt: skip
        return out.to(v.dtype)
