"""Every op can be measured, and what is measured is the work that it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.bench import probes
from lmdeploy.bench.device import measure_roof, seconds_per_call
from lmdeploy.bench.kernels import measure
from lmdeploy.bench.products import products
from lmdeploy.bench.roofline import Roof
from lmdeploy.bench.shapes import QUANTISED
from lmdeploy.config.model import ModelConfig
from lmdeploy.config.quantization import read_quantization
from lmdeploy.extend import op_names
from lmdeploy.models.stored import bytes_per_weight
from lmdeploy.ops.table import registered

CPU = torch.device('cpu')
CONFIG = ModelConfig.from_dict({
    'architectures': ['LlamaForCausalLM'], 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': 96, 'max_position_embeddings': 256})
BENCH = probes.Bench(CONFIG, CPU, torch.float32, rows=5, context=70)


@pytest.fixture(autouse=True)
def one_copy(monkeypatch):
    monkeypatch.setattr(probes, 'CACHED_CPU', 0)


def fast(device: str) -> set[str]:
    """The ops that have an implementation of ours for a device."""
    return {name for name, op in registered(device).items()
            if any(candidate.ours and candidate.device == device for candidate in op.candidates)}


def test_every_op_with_an_implementation_is_measured():
    assert probes.OPS.keys() | probes.AS_THE_MODEL_DOES <= set(op_names())
    assert {probe.name for probe in probes.ops(BENCH)} == fast('cpu') - probes.AS_THE_MODEL_DOES


@pytest.mark.parametrize('name', probes.OPS)
def test_calls_fit_their_contracts(name):
    shape, nbytes, _, make = probes.OPS[name](BENCH, name)
    make()()  # the reference or the CPU's own, whichever there is
    assert shape and nbytes > 0


def test_products_count_their_weights():
    found = {probe.name: probe for probe in products(BENCH)}
    assert found.keys() == {f'linear {name}' for name in ('qkv', 'o', 'down', 'head', 'gate_up')}
    assert found['linear qkv'].flops == 2 * 5 * 32 * 64 and found['linear gate_up'].flops == 2 * 5 * 32 * 96
    assert found['linear o'].bytes == 4 * (32 * 32 + 5 * (32 + 32))
    assert found['linear head'].calls[0]().shape == (5, 96)
    assert found['linear gate_up'].calls[0]().shape == (5, 48)


@pytest.mark.parametrize('quant', QUANTISED)
def test_products_of_quantised_weights(quant):
    bench = probes.Bench(CONFIG, CPU, torch.float32, rows=2, context=8)
    found = {probe.name: probe for probe in products(bench, quant)}
    assert found.keys() >= {f'linear {name} {quant}' for name in ('qkv', 'o', 'down', 'gate_up')}
    bits = int(quant[1]) if quant[0] == 'w' else 8
    least = 32 * 64 * bits / 8 + 4 * 2 * (32 + 64)
    assert least <= found[f'linear qkv {quant}'].bytes <= 1.3 * least
    assert found[f'linear gate_up {quant}'].calls[0]().shape == (2, 48)
    assert ('a8' in quant or 'fp8' in quant) is bool(found[f'linear o {quant}'].inputs)


def test_bytes_of_stored_weights():
    assert bytes_per_weight(CONFIG, torch.bfloat16) == 2
    eight, four = (replace(CONFIG, quantization=read_quantization({'quantization_config': QUANTISED[name]}))
                   for name in ('fp8', 'w4a16'))
    assert bytes_per_weight(eight, torch.bfloat16) == 1
    assert bytes_per_weight(four, torch.float32) == (4 + (16 + 4) / 128) / 8
    assert bytes_per_weight(four, torch.float32, CPU) == 4  # there it is dequantised


def test_attention_counts_the_pairs_that_are_seen():
    decode, prompt, *codes = probes.attention(BENCH)
    assert [probe.name.removeprefix('attention ') for probe in codes] == [
        'decode int8', 'prompt int8', 'decode int4', 'prompt int4']
    assert all(probe.calls[0]().shape[1:] == (4, 8) and probe.bytes < decode.bytes for probe in codes[::2])
    assert decode.flops == 4 * (5 * 70) * 32 and prompt.flops == 4 * (70 * 71 / 2) * 32
    assert decode.calls[0]().shape == (5, 4, 8) and prompt.calls[0]().shape == (70, 4, 8)
    assert decode.implementation == 'cpu_spans'


def test_a_report_has_a_figure_for_each():
    roof = Roof(1e12, 1e13)
    report = measure(CONFIG, 'tiny', CPU, torch.float32, [1, 2], 70, roof=roof, only='norm')
    assert [(figure.name, figure.shape) for figure in report.figures] == [
        (name, f'[{rows}, 32]') for rows in (1, 2) for name in ('add_rms_norm', 'rms_norm')]
    for figure in report.figures:
        assert figure.ratio == pytest.approx(figure.bound_us / figure.microseconds) and figure.bound_by == 'memory'
        assert figure.gb_per_s == pytest.approx(1000 * figure.ratio)
    products = measure(CONFIG, 'tiny', CPU, torch.float32, [1], 70, roof=Roof(1e12, 1e9), only='linear o').figures
    assert [figure.bound_by for figure in products] == ['compute']


def test_the_clock_counts_one_call():
    import time

    seconds = seconds_per_call([lambda: time.sleep(0.004), lambda: time.sleep(0.004)], CPU, rounds=1)
    assert 0.004 <= seconds < 0.02


def test_the_roof_of_this_device(monkeypatch):
    monkeypatch.setattr('lmdeploy.bench.device.CPU_COPY_BYTES', 1 << 22)
    monkeypatch.setattr('lmdeploy.bench.device.CPU_SIDE', 128)
    roof = measure_roof(CPU, torch.float32)
    assert 1e8 < roof.copy < 1e13 and 1e8 < roof.peak < 1e14 and roof.source.startswith('measured: a copy of 4 MiB')


@pytest.mark.gpu
def test_on_a_gpu():
    report = measure(CONFIG, 'tiny', torch.device('cuda', 0), torch.bfloat16, [1, 20], 130, roof=Roof(1e13, 1e16))
    wanted = {'linear head', 'attention decode', 'attention prompt', 'rms_norm', 'rope_write_kv', 'sample_slots'}
    assert wanted | fast('cuda') - probes.AS_THE_MODEL_DOES <= {figure.name for figure in report.figures}
    assert all(0 < figure.ratio < 1 for figure in report.figures)
