"""The GPU backend against the reference over a growing cache: prompts, chunks, decodes and all at once."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from lmdeploy.attention.backend import Rotation
from lmdeploy.attention.reference import Reference
from lmdeploy.attention.triton_paged import TritonPaged
from lmdeploy.kv.cache import KVCache, KVShape
from lmdeploy.ops.kv_codes import KeyBasis, KeyOffset, Turns
from lmdeploy.ops.rope import rope_tables
from lmdeploy.runner.batch import ForwardBatch
from tests.attention.test_backends import CASE, batch_of

ERRORS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
STEPS = ([5, 70, 3], [1, 1, 1], [1, 30, 2], [1, 1, 64], [1, 1, 1])  # new tokens of each row; the decodes come first


def on(device: torch.device, batch: ForwardBatch) -> ForwardBatch:
    tensors = {field.name: value.to(device) for field in dataclasses.fields(batch)
               if isinstance(value := getattr(batch, field.name), torch.Tensor)}  # fmt: skip
    return replace(batch, **tensors)


@pytest.mark.parametrize(('block_size', 'bits', 'offset'), [
    (64, 0, False), (128, 0, False), (128, 8, True), (64, 4, False)])
# codes of 4 bits without an offset have axes of their own
def test_a_growing_cache(block_size, bits, offset, dtype, device):
    generator = torch.Generator().manual_seed(0)
    backends = TritonPaged(), Reference()
    caches = [KVCache(KVShape(1, 2, 32, bits), 10, block_size, dtype, device) for _ in backends]
    blocks = [[7, 8, 9], [1, 2, 3], [5, 4, 6]]
    frequencies = torch.rand(16, generator=generator).to(device)
    values = 20 * torch.randn(2, 32, generator=generator).to(device)
    key_offset = KeyOffset(values, Turns(frequencies, 1.0)) if offset else None
    basis = None
    if bits == 4 and not offset:
        basis = KeyBasis.of(*(torch.randn(99, heads, 32, generator=generator).to(device) for heads in (6, 2)))
    done = [0, 0, 0]
    for feed in STEPS:
        batch = on(device, batch_of(done, feed, blocks, block_size))
        batch.num_decode = next((i for i, count in enumerate(feed) if count > 1), len(feed))
        qkv = torch.randn(sum(feed), 10, 32, generator=generator).to(device)
        if offset:
            qkv[:, 6:8] += values
        rotation = Rotation(*rope_tables(batch.positions, frequencies, 1.0), offset=key_offset,
                            basis=basis)  # fmt: skip
        plans = [backend.prepare(replace(CASE, bits=bits), batch, kv) for backend, kv in zip(backends, caches)]
        for window in CASE.windows:
            results = []
            for backend, kv, batch.plan in zip(backends, caches, plans):
                results.append(backend.run(qkv.to(dtype), rotation, kv.layer(0), batch, 32**-0.5, window))
            assert results[0].dtype is dtype
            error = ERRORS[dtype] * (10 if bits else 1)  # a code may be its neighbour
            torch.testing.assert_close(*results, atol=error, rtol=error)
        done = [d + f for d, f in zip(done, feed)]
