"""16-bit logits on a GPU against transformers' in float32, with the heads that real models have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.models.driver import Driver, load_model
from tests.models.test_logits import tokens, wanted_logits
from tests.models.tiny import ARCHITECTURES, GEMMA_ROPES, SIZES, load_reference

LAYERS = 2
# heads, key heads, channels of a head; rows and inner channels that no tile divides in some
REAL: dict[str, dict[str, Any]] = {
    'LlamaForCausalLM': {'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 128},
    'Qwen2ForCausalLM': {'num_attention_heads': 14, 'num_key_value_heads': 2, 'hidden_size': 896,
                         'intermediate_size': 4864},
    'Qwen3ForCausalLM': {'num_attention_heads': 16, 'num_key_value_heads': 8, 'head_dim': 128},
    'MistralForCausalLM': {'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 128, 'sliding_window': 100},
    'InternLM2ForCausalLM': {'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 128},
    'InternLM3ForCausalLM': {'num_attention_heads': 32, 'num_key_value_heads': 2, 'head_dim': 128},
    'Gemma3ForCausalLM': {'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256, 'sliding_window': 100,
                          'query_pre_attn_scalar': 256, 'hidden_size': 640, 'rope_parameters': GEMMA_ROPES},
}  # fmt: skip
SHAPE = {'hidden_size': 512, 'intermediate_size': 1376, 'num_hidden_layers': LAYERS}


def limit(dtype: torch.dtype) -> float:
    """The relative error, root of the mean square, that rounding alone explains.

    Rounding a number has a relative error spread evenly over the step's half on either side, which is eps / sqrt(12) in
    the mean square. A layer rounds the weights and the results of four products, two norms, queries and keys, the
    attention's probabilities and its output, the gated product and two sums; the ends round twice more. They add up as
    a random walk.
    """
    roundings = 2 * 4 + 2 + 2 + 2 + 1 + 2
    return torch.finfo(dtype).eps / math.sqrt(12) * math.sqrt(LAYERS * roundings + 2)


def check(arch: str, dtype: torch.dtype, device: str, tiny) -> None:
    folder = tiny(arch, **(SHAPE | REAL[arch]))
    ids = tokens(1, 300)
    wanted = wanted_logits(load_reference(folder), ids)
    driver = Driver(load_model(folder, dtype, device=device), dtype=dtype)
    row = driver.row()
    parts = [driver.step([(row, ids[:200])]), driver.step([(row, ids[200:270])])]
    parts += [driver.step([(row, [token])]) for token in ids[270:]]
    for found in (driver.sequence(ids), torch.cat([rows for rows, in parts])):
        error = (found.cpu() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < limit(dtype)


def test_every_architecture_has_a_real_shape():
    assert REAL.keys() == ARCHITECTURES.keys() and SHAPE.keys() <= SIZES.keys()


def test_the_limit_is_that_of_rounding(tiny):
    """It holds for the references, and is not far from what they do."""
    check('Qwen3ForCausalLM', torch.bfloat16, 'cpu', tiny)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('arch', REAL)
def test_logits_are_those_of_float32(arch, dtype, tiny):
    """Whole, in chunks, and token by token."""
    check(arch, dtype, 'cuda', tiny)
