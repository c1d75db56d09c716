"""The laws of weight files on real models."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lmdeploy.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.real


@pytest.mark.parametrize('model', ['smollm2', 'qwen_coder'])
def test_every_tensor_equals_transformers(model: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit in float32; transformers dequantises with the gguf package."""
    from transformers import AutoModelForCausalLM

    path: Path = request.getfixturevalue(model)
    wanted = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            found = checkpoint.get(name, dtype=torch.float32)
            assert torch.equal(found.view(torch.int32), wanted[name].view(torch.int32)), name
        assert wanted.keys() - set(checkpoint.names()) <= {'lm_head.weight'}


def test_opens_within_a_second(qwen_coder: Path) -> None:
    start = time.perf_counter()
    open_checkpoint(qwen_coder).close()
    assert time.perf_counter() - start < 1
