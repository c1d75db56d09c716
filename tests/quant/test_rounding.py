"""Rounding to the nearest: no code is further off than it has to be; made-up weights load as the configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy.config.model import ModelConfig
from lmdeploy.config.quantization import AWQ, FLOAT, FP8, GPTQ, INT, PACK, Storage
from lmdeploy.models.registry import build_model, decoder_spec
from lmdeploy.models.shapes import tensor_shapes
from lmdeploy.nn.build import Build
from lmdeploy.ops.cpu import features
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.policy import FORMATS
from lmdeploy.quant.rounding import round_weight
from lmdeploy.weights.dummy import DummyCheckpoint
from tests.quant.formats.folders import MODELS
from tests.quant.formats.test_dense_gguf import saved

E4M3 = 'float8_e4m3fn'
WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
INTEGERS = [Storage(AWQ, bits=4, group=32, symmetric=False), Storage(GPTQ, bits=3, group=32), Storage(PACK, bits=5),
            Storage(GPTQ, bits=8, group=32, symmetric=False, zero_shift=1), Storage(INT), Storage(PACK, bits=4, rows=0),
            Storage(PACK, bits=2, group=20, symmetric=False)]  # fmt: skip
FLOATS = [Storage(FLOAT, E4M3), Storage(FLOAT, E4M3, rows=0), Storage(FP8, E4M3, 8, 20, 20), Storage(FP8, E4M3, rows=0)]


@pytest.mark.parametrize('storage', INTEGERS + FLOATS, ids=str)
def test_the_nearest_code_of_what_can_be_stored(tmp_path: Path, storage: Storage) -> None:
    bundle = round_weight(WEIGHT, storage, torch.float16)
    form = FORMATS[storage.format](storage)
    again = form.load(saved(tmp_path, form.save(bundle)), torch.float32)  # it fits the format
    weight = dequantize_bundle(again, torch.float32)
    assert torch.equal(weight, dequantize_bundle(bundle, torch.float32))
    step = bundle.scales.t().float().repeat_interleave(storage.group or 96, 1)[:, :96]
    error = (weight - WEIGHT).abs()
    if storage.kind == 'int':
        assert (error <= step * 0.51 + 1e-6).float().mean() > 0.97  # all but extremes that an offset moved out of reach
        assert (error <= step * 1.01).all()
    else:
        assert (error <= WEIGHT.abs() / 16 + step / 512).all()  # half a step of 3 bits, and of the smallest numbers


def test_nothing_but_zeros() -> None:
    for storage in INTEGERS + FLOATS:
        weight = dequantize_bundle(round_weight(torch.zeros(8, 96), storage), torch.float32)
        assert (weight == 0).all()
    with pytest.raises(ValueError, match='needs data'):
        round_weight(WEIGHT, Storage(INT, activation='int8', static=True))


@pytest.mark.parametrize('name', MODELS)
def test_made_up_weights_are_quantised(name: str) -> None:
    values = {'architectures': ['LlamaForCausalLM'], 'hidden_size': 64, 'num_hidden_layers': 1, 'vocab_size': 96,
              'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 96,
              'quantization_config': MODELS[name].config | {'modules_to_not_convert': ['lm_head']}}
    config = ModelConfig.from_dict(values)
    cpu = torch.device('cpu')
    checkpoint = DummyCheckpoint(Path('config.json'), values, tensor_shapes(decoder_spec(config)), cpu)
    model = build_model(config, Build())
    model.load(checkpoint.prefix())
    checkpoint.finish(model.ignore)
    integers = name in ('int8', 'int8-static', 'smooth-int8') and features.int8_dot()
    wanted = 'onednn_int8' if integers else 'quantised_input' if MODELS[name].activation else 'dequantised'
    assert model.choices()['linear'] == wanted
