"""The laws of weight files on real models."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lmdeploy.weights.checkpoint import open_checkpoint
from lmdeploy.weights.dequant import BLOCK_TYPES

pytestmark = pytest.mark.real


@pytest.mark.parametrize('model', ['smollm2', 'qwen_coder'])
def test_slices_equal_the_reference(model: str, request: pytest.FixtureRequest) -> None:
    """The first, middle and last rows of every quantised tensor, bit for bit."""
    path: Path = request.getfixturevalue(model)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            stored = checkpoint.stored(name)
            if stored.dtype_name not in BLOCK_TYPES or stored.heads:
                continue  # permuted rows are covered by the comparison of whole models
            rows = np.array(sorted({0, 1, stored.shape[0] // 2, stored.shape[0] - 1}))
            wanted = gguf.quants.dequantize(reader[stored.name].data[rows], reader[stored.name].tensor_type)
            found = checkpoint.get(name)[rows].numpy()
            assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32)), name


@pytest.mark.parametrize('model', ['smollm2', 'qwen_coder'])
def test_every_tensor_equals_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    path: Path = request.getfixturevalue(model)
    wanted = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            assert torch.equal(checkpoint.get(name, dtype=torch.float32), wanted[name]), name
        assert wanted.keys() - set(checkpoint.names()) <= {'lm_head.weight'}


def test_opens_within_a_second(qwen_coder: Path) -> None:
    start = time.perf_counter()
    open_checkpoint(qwen_coder).close()
    assert time.perf_counter() - start < 1
