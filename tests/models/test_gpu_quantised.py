"""Quantised models on a GPU, with every cache: their logits are those of the reference kernels on a CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.registry import CausalLM, build_model
from lmdeploy.nn.build import Build
from lmdeploy.weights.checkpoint import open_checkpoint
from tests.models.driver import Driver
from tests.models.test_gpu_logits import limit
from tests.models.tiny import VOCAB, make_tiny
from tests.quant.formats import packers
from tests.quant.formats.folders import (
    AWQ,
    MODELS,
    TOKENS,
    Model,
    compressed_config,
    fp8_block,
    gptq_config,
    grouped,
    write_pair,
)

pytestmark = pytest.mark.gpu
IDS = torch.randint(3, VOCAB, (150,), generator=torch.Generator().manual_seed(0)).tolist()
SHAPE = {'hidden_size': 256, 'intermediate_size': 384, 'num_attention_heads': 4, 'num_key_value_heads': 2,
         'head_dim': 64}  # fmt: skip


def packed(bits: int, group: int, symmetric: bool, inputs: bool) -> Model:
    weights = {'num_bits': bits, 'type': 'int', 'symmetric': symmetric, 'strategy': 'group', 'group_size': group}
    write = grouped(lambda codes: packers.compressed(codes, symmetric), bits, group, symmetric)
    return Model(write, compressed_config('pack-quantized', weights, TOKENS if inputs else None),
                 'int8' if inputs else '')  # fmt: skip


FORMATS: dict[str, Model] = {
    'awq-128': Model(grouped(packers.awq, 4, 128, False), AWQ | {'group_size': 128}),
    'awq-32': Model(grouped(packers.awq, 4, 32, False), AWQ | {'group_size': 32}),
    'gptq-2': Model(grouped(lambda c: packers.gptq(c, 2), 2, 64, False), gptq_config(2, 64, False, 2)),
    'gptq-8': Model(grouped(lambda c: packers.gptq(c, 2), 8, 128, False), gptq_config(8, 128, False, 2)),
    'gptq-act': Model(grouped(lambda c: packers.gptq(c, 1), 4, 64, False, shuffled='own'),
                      gptq_config(4, 64, False, 1, desc_act=True)),
    'packed-3': packed(3, 128, False, False),
    'packed-5': packed(5, 64, True, False),
    'w4a8': packed(4, 128, True, True),
    'w4a8-asym': packed(4, 128, False, True),
    'fp8-block': Model(fp8_block('weight_scale_inv', 128), {
        'quant_method': 'fp8', 'weight_block_size': [128, 128], 'modules_to_not_convert': ['lm_head']},
        'float8_e4m3fn', 128),
    **{name: MODELS[name] for name in ('gptq-3', 'int8', 'int8-static', 'float8', 'float8-weights', 'smooth-int8',
                                       'smooth-fp8')},
}  # fmt: skip
INPUTS = {'': 0.0, 'int8': 3e-2, 'float8_e4m3fn': 8e-2}  # where codes of inputs fall otherwise
CACHE = {0: 0.0, 8: 1e-2, 4: 1e-1}  # the same of keys and values


def load(folder: Path, build: Build) -> CausalLM:
    with open_checkpoint(folder) as checkpoint:
        model = build_model(ModelConfig.from_dict(checkpoint.config), build)
        model.load(checkpoint.prefix())
    return model


def logits(model: CausalLM, dtype: torch.dtype) -> Tensor:
    """Of one long chunk, of one that is shorter, and of single tokens."""
    driver = Driver(model, dtype=dtype)
    row = driver.row()
    parts = [driver.step([(row, IDS[:100])]), driver.step([(row, IDS[100:130])])]
    parts += [driver.step([(row, [token])]) for token in IDS[130:]]
    return torch.cat([rows for rows, in parts]).cpu()


@pytest.mark.parametrize('kv_bits', CACHE, ids=lambda bits: f'kv{bits or 16}')
@pytest.mark.parametrize('name', FORMATS)
def test_logits(name, kv_bits, tmp_path):
    source = make_tiny('LlamaForCausalLM', tmp_path / 'source', **SHAPE)
    folder, _ = write_pair(source, tmp_path, FORMATS[name])
    wanted = logits(load(folder, Build(torch.float32, kv_bits=kv_bits)), torch.float32)
    model = load(folder, Build(torch.bfloat16, torch.device('cuda'), kv_bits=kv_bits))
    assert model.choices()['linear'].startswith('triton')
    error = (logits(model, torch.bfloat16) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < limit(torch.bfloat16) + INPUTS[FORMATS[name].activation] + CACHE[kv_bits]
