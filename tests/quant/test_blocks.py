"""GGUF weights that stay quantised: the numbers in their blocks, and models that multiply with them on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmdeploy.config.model import ModelConfig
from lmdeploy.config.quantization import FLOAT, Storage
from lmdeploy.models.registry import CausalLM, build_model
from lmdeploy.models.stored import bytes_of_blocks
from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.ops.cpu import features, int4, int8
from lmdeploy.quant.blocks import alike, by_channel, four_bits, rounded
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.formats.gguf import SCHEMES
from lmdeploy.quant.kernels.cpu import keeps_blocks, pack_int4
from lmdeploy.quant.policy import QuantPolicy
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import open_checkpoint
from lmdeploy.weights.dequant import BLOCK_SIZES, BLOCK_TYPES, FOUR_BITS, dequantize
from tests.models.driver import Driver
from tests.weights.files import HIDDEN, VOCAB, write_gguf

BF16, CPU = torch.bfloat16, torch.device('cpu')
IDS = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(0)).tolist()

pytestmark = pytest.mark.skipif(not features.packed_codes(), reason='no vector instructions for packed codes')


def blocks(kind: str, out: int = 6, runs: int = 3) -> LinearBundle:
    elements, nbytes = BLOCK_SIZES[kind]
    codes = torch.randint(0, 60, (out, runs * nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return LinearBundle(SCHEMES[kind], out, runs * elements, codes=codes)


@pytest.mark.parametrize('kind', sorted(FOUR_BITS))
def test_codes_scales_and_minima_are_the_weight(kind: str):
    bundle = blocks(kind)
    parts = four_bits(bundle)
    assert parts.codes.shape == (6, bundle.in_features) and int(parts.codes.max()) <= 15
    spread = [values.t().repeat_interleave(32, 1) for values in (parts.scales, parts.minima)]
    found = parts.codes.double() * spread[0].double() - spread[1].double()
    torch.testing.assert_close(found, dequantize(bundle.stored, kind).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('kind', sorted(FOUR_BITS))
def test_packed_blocks_are_off_by_the_rounding_of_scale_and_offset(kind: str):
    bundle = blocks(kind)
    weight, parts = dequantize(bundle.stored, kind).double(), four_bits(bundle)
    scales, minima = (values.t().repeat_interleave(32, 1).double().abs() for values in (parts.scales, parts.minima))
    exact = int4.unpack_int4(pack_int4(bundle)).t()[:6].double()  # and rounded to bfloat16 as a whole
    offsets = minima + 8 * scales if kind != 'Q4_0' else 0 * minima
    assert ((exact - weight).abs() <= 2**-8 * (8 * scales + offsets + weight.abs()) * 1.01).all()


@pytest.mark.parametrize('kind', sorted(BLOCK_TYPES))
def test_eight_bits_are_off_by_half_a_step(kind: str):
    bundle = replace(blocks(kind), bias=torch.ones(6))
    weight, made = dequantize(bundle.stored, kind), by_channel(bundle)
    assert (made.scheme.name, made.scheme.bits, made.scheme.group, made.scheme.symmetric) == ('int', 8, 0, True)
    assert made.scales is not None and made.scales.dtype == BF16 and torch.equal(made.bias, torch.ones(6))
    found = dequantize_bundle(made, torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    # half a step; the largest may be cut where its scale was rounded down, and scales are up to 2^-8 larger
    assert ((found - weight).abs() <= step * (0.5 + 127 * 2**-7)).all()
    assert (found - weight).abs().mean() < 0.3 * step.mean()


def test_float8_has_the_nearest_codes():
    weight = torch.randn(5, 40)
    made = rounded(LinearBundle(dense_scheme(32), 5, 40, weight=weight), Storage(FLOAT, 'float8_e4m3fn'))
    assert made.stored.dtype == torch.float8_e4m3fn
    assert ((dequantize_bundle(made, torch.float32) - weight).abs() <= weight.abs() / 15 + 1e-3).all()


def test_only_four_bits_of_one_type_are_left_as_they_are():
    four, other, six = blocks('Q4_0'), blocks('Q4_1'), blocks('Q5_0')
    assert alike([four, four]) == [four, four]
    for mixed in ([four, other], [four, six], [six, six], [six]):
        assert {one.scheme.name for one in alike(mixed)} == {'int'}
    dense = LinearBundle(dense_scheme(32), 2, 2, weight=torch.ones(2, 2))
    assert alike([dense, dense]) == [dense, dense]


def load(path: Path, dtype: torch.dtype = BF16, exact: bool = False, head: str = '') -> CausalLM:
    with open_checkpoint(path) as checkpoint:
        model = build_model(ModelConfig.from_dict(checkpoint.config), Build(dtype, exact=exact, head=head))
        model.load(checkpoint.prefix())
        checkpoint.finish(model.ignore)
    return model


def logits(model: CausalLM) -> Tensor:
    return Driver(model, dtype=model.build.dtype).sequence(IDS)


MIXED = {'q_proj': 'Q4_0', 'k_proj': 'Q4_0', 'v_proj': 'Q8_0', 'gate_proj': 'Q4_1', 'up_proj': 'Q5_1',
         'embed': 'Q8_0', 'head': 'Q5_0'}  # fmt: skip


@pytest.mark.parametrize(('arch', 'options'), [
    ('llama', {'kind': 'Q4_0'}), ('llama', {'kind': 'Q4_1', 'tied': True}), ('gemma3', {'kind': 'Q5_1', 'tied': True}),
    ('qwen2', {'kind': 'Q8_0', 'tied': True, 'bias': True}), ('qwen2', {'kind': 'Q5_0', 'kinds': MIXED, 'bias': True}),
], ids=str)  # fmt: skip
def test_a_model_with_blocks_gives_the_logits_of_its_dense_weights(tmp_path: Path, arch: str, options: dict):
    """No further off than bfloat16 itself, whose error is that of the dense model; eight bits are a little coarser."""
    path = tmp_path / 'x.gguf'
    write_gguf(path, arch, **options)
    true, dense, kept = logits(load(path, torch.float32)), logits(load(path, exact=True)), logits(load(path))
    rms = [float((found.double() - true.double()).pow(2).mean().sqrt()) for found in (dense, kept)]
    assert 0 < rms[1] < 3 * rms[0] and not torch.equal(kept, dense)
    assert (kept.argmax(1) == true.argmax(1)).double().mean() > 0.85


def test_a_dtype_of_32_bits_asks_for_exact_weights(tmp_path: Path):
    write_gguf(tmp_path / 'x.gguf', 'llama', kind='Q4_0')
    model, kept = load(tmp_path / 'x.gguf', torch.float32), load(tmp_path / 'x.gguf')
    assert model.choices()['linear'] == 'onednn_packed' and kept.choices()['linear'] == 'cpu_int4'
    assert load(tmp_path / 'x.gguf', exact=True).choices()['linear'] == 'onednn_packed'
    assert not keeps_blocks(CPU, torch.float16) and not keeps_blocks(torch.device('meta'), BF16)


def test_a_quantised_model_takes_quantised_memory(tmp_path: Path):
    """Codes and scales of every layer, and the embedding's blocks; nothing dense beside them."""
    write_gguf(tmp_path / 'x.gguf', 'llama', kind='Q4_1', tied=True)
    model = load(tmp_path / 'x.gguf')
    held = 0
    for layer in model.layers:
        linears = [layer.attention.qkv, layer.attention.o, layer.mlp.down]
        packed = [one._packed for one in linears] + [layer.mlp.gate_up._packed[1]]
        for one in packed:
            assert isinstance(one, int4.Int4Weight)
            assert one.nbytes == one.codes.numel() + one.codes.shape[0] * (one.padded_in // 32) * 4
            held += one.nbytes
    assert held == sum(rows * inputs // 32 * 20 for rows, inputs in ((256, 64), (64, 128), (192, 64), (64, 96))) * 2
    assert model.embedding.weight.dtype == torch.uint8
    assert model.embedding.weight.numel() == VOCAB * HIDDEN // 32 * 20


def test_the_plan_of_memory_knows_what_blocks_take(tmp_path: Path):
    write_gguf(tmp_path / 'four.gguf', 'llama', kind='Q4_1')
    write_gguf(tmp_path / 'eight.gguf', 'llama', kind='Q5_0', kinds={'gate_proj': 'Q4_0', 'up_proj': 'Q4_0'})
    write_gguf(tmp_path / 'dense.gguf', 'llama', kind='F16')
    found = []
    for name in ('four', 'eight', 'dense'):
        with open_checkpoint(tmp_path / f'{name}.gguf') as checkpoint:
            found.append(bytes_of_blocks(checkpoint))
    layer, gated = 256 * 64 + 64 * 128 + 192 * 64 + 64 * 96, 192 * 64
    assert found == [5 / 8, (layer - gated * 3 / 8) / layer, None]


def test_rows_of_the_embedding_are_dequantised_one_by_one(tmp_path: Path):
    write_gguf(tmp_path / 'x.gguf', 'gemma3', kind='Q5_0', tied=True)
    kept, dense = load(tmp_path / 'x.gguf'), load(tmp_path / 'x.gguf', exact=True)
    ids = torch.tensor([4, 0, VOCAB - 1, 4], dtype=torch.int32)
    assert torch.equal(kept.embedding(ids), dense.embedding(ids))
    assert torch.equal(kept.embedding.rows(ids).to(BF16), dense.embedding.weight[ids.long()])


@pytest.mark.parametrize('tied', [True, False])
def test_the_head_of_a_dense_model_in_eight_bits(tmp_path: Path, tied: bool):
    write_gguf(tmp_path / 'x.gguf', 'qwen2', kind='F16', tied=tied, bias=True)
    dense, eight = load(tmp_path / 'x.gguf'), load(tmp_path / 'x.gguf', head='int8')
    name = eight.head.kernel.name
    assert name == ('onednn_int8_wide' if features.int8_dot() else 'cpu_int8') and dense.head.kernel.name != name
    assert eight.choices()['linear'] == dense.choices()['linear']
    hidden = torch.randn(3, HIDDEN).to(BF16)
    wanted = hidden.double() @ dense.embedding.weight.double().t() if tied else dense.logits(hidden).double()
    found = eight.logits(hidden).double()
    spread = hidden.double().abs().sum(1, keepdim=True) * 4.5 / 254  # half a step of weights that are below 4.5
    assert ((found - wanted).abs() <= spread + 2**-7 * wanted.abs()).all()
    assert 0 < (found - wanted).abs().mean() < 0.1


def test_a_head_stays_dense_where_no_kernel_takes_its_codes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_gguf(tmp_path / 'x.gguf', 'llama', kind='F32')
    model = load(tmp_path / 'x.gguf', torch.float32, head='int8')
    assert model.head.kernel.name in ('onednn_packed', 'torch')
    assert torch.equal(logits(model), logits(load(tmp_path / 'x.gguf', torch.float32)))


def test_blocks_stay_where_the_policy_says_so(tmp_path: Path):
    write_gguf(tmp_path / 'x.gguf', 'llama', kind='Q8_0')
    with open_checkpoint(tmp_path / 'x.gguf') as checkpoint:
        prefix = checkpoint.prefix('model.layers.0.mlp.down_proj')
        for keeps, kernel in ((True, int8), (False, None)):
            linear = Linear(Build(BF16, policy=QuantPolicy(blocks=keeps)), 96, (64,))
            linear.load(prefix)
            assert (linear.kernel.name == 'onednn_packed') == (kernel is None)
