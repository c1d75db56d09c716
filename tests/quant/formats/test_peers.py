"""Layers that AutoAWQ and AutoGPTQ packed and unpacked themselves; ``peers/make.py`` wrote down what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lmdeploy.config.quantization import AWQ, GPTQ, Storage
from lmdeploy.quant.policy import FORMATS
from tests.quant.formats.test_dense_gguf import saved

PEERS = Path(__file__).parent / 'peers'


def check(folder: Path, storage: Storage, tensors: dict[str, Tensor]) -> None:
    weight = tensors.pop('weight')
    form = FORMATS[storage.format](storage)
    bundle = form.load(saved(folder, tensors), torch.float32)
    assert torch.equal(form.dequant(bundle), weight.t())
    back = form.save(bundle)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_autoawq(tmp_path: Path) -> None:
    check(tmp_path, Storage(AWQ, bits=4, group=32, symmetric=False), load_file(PEERS / 'awq.safetensors'))


@pytest.mark.parametrize('name', [f'{bits}{kind}' for bits in (2, 3, 4, 8) for kind in ('', 'act', 'sym', 'actsym')])
def test_autogptq(tmp_path: Path, name: str) -> None:
    layer = {key.removeprefix(f'{name}.'): tensor for key, tensor in load_file(PEERS / 'gptq.safetensors').items()
             if key.startswith(f'{name}.')}
    check(tmp_path, Storage(GPTQ, bits=int(name[0]), group=32, symmetric='sym' in name, zero_shift=1), layer)
