"""The reference backend: plain torch on any device, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionCase, Rotation
from lmdeploy.kv.cache import KVCache, KVLayer
from lmdeploy.ops.kv_codes import store_codes
from lmdeploy.ops.paged_attention import attend_last, attend_last_of, code_attention, paged_attention, read_codes
from lmdeploy.ops.write_kv import write_kv
from lmdeploy.runner.batch import ForwardBatch


class Reference:
    """Refuses nothing and is fast at nothing; the oracle of the others."""

    name = 'reference'
    static = True
    bits: tuple[int, ...] = (0, 8, 4)

    def refuse(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[str]:
        return []

    def prepare(self, case: AttentionCase, batch: ForwardBatch, kv: KVCache) -> None:
        return None

    def run(self, qkv: Tensor, rotation: Rotation, layer: KVLayer, batch: ForwardBatch, scale: float,
            window: int) -> Tensor:  # fmt: skip
        q, k, v = rotation.split(qkv, layer.k.shape[1])
        if layer.k_scales is not None:
            return self._run_codes(q, k, v, rotation, layer, batch, scale, window)
        write_kv.reference(k, v, layer.k, layer.v, batch.kv_slots)
        if batch.static and not batch.host_kv_lens:
            return attend_last(q, layer.k, layer.v, batch.tables(), batch.kv_lens, scale, window).to(v.dtype)
        out = paged_attention.reference(q, layer.k, layer.v, batch.tables(), batch.host_query_start,
                                        batch.host_kv_lens, scale, window)  # fmt: skip
        return out.to(v.dtype)

    def _run_codes(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, layer: KVLayer, batch: ForwardBatch,
                   scale: float, window: int) -> Tensor:  # fmt: skip
        store_codes(k, v, layer, batch.kv_slots, rotation.basis)
        if batch.static and not batch.host_kv_lens:
            keys, values = read_codes(layer, batch.tables(), rotation.offset, q.shape[-1], rotation.basis)
            return attend_last_of(q, keys, values, batch.kv_lens, scale, window).to(v.dtype)
        out = code_attention(q, layer, rotation.offset, batch.tables(), batch.host_query_start, batch.host_kv_lens,
                             scale, window, rotation.basis)  # fmt: skip
        return out.to(v.dtype)
