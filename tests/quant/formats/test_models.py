"""A model in any format computes what its dequantised weights compute, with its inputs quantised as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmdeploy.config.model import ModelConfig
from lmdeploy.errors import LoadError
from lmdeploy.models.registry import build_model
from lmdeploy.nn.build import Build
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels import (
    Dense,
    Dequantised,
    DequantisedGated,
    KernelCase,
    Merged,
    QuantisedInput,
    QuantisedPack,
    register_gated,
    register_linear,
    withdraw,
)
from lmdeploy.weights.checkpoint import open_checkpoint
from tests.models.driver import Driver, load_model
from tests.models.tiny import VOCAB, make_tiny
from tests.quant.formats.folders import MODELS, Model, write_pair
from tests.tolerance import tolerance

IDS = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(0)).tolist()
Kernel = TypeVar('Kernel', Dense, Dequantised, QuantisedInput)
LIMITS = {'int8': 127.0, 'float8_e4m3fn': 448.0}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('tiny')


def source(tiny: Path, arch: str = 'LlamaForCausalLM') -> Path:
    """A tiny dense model whose widths hold whole words of 3-bit codes."""
    return make_tiny(arch, tiny / arch, hidden_size=64, intermediate_size=96, num_attention_heads=4)


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return Driver(load_model(folder, dtype), dtype=dtype).sequence(IDS)


def rounded(x: Tensor, model: Model) -> Tensor:
    """``x`` as the nearest values that its codes can be, token by token."""
    out, size, limit = torch.empty_like(x), model.activation_group or x.shape[1], LIMITS[model.activation]
    for token in range(len(x)):
        for at in range(0, x.shape[1], size):
            part = x[token, at : at + size]
            scale = torch.tensor(model.input_scale) if model.input_scale else part.abs().max() / limit
            codes = (part / scale).clamp(-limit, limit)
            codes = codes.round() if model.activation == 'int8' else codes.to(torch.float8_e4m3fn).float()
            out[token, at : at + size] = codes * scale
    return out


class Weights(Dense):
    """Keeps the dense weights of a model, in the order in which it loads them."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor | None]] = []

    def pack(self, bundle: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
        self.kept.append(super().pack(bundle, case))
        return self.kept[-1]


class Products(QuantisedInput):
    """Keeps every product that it computes: which layer, in the order of loading, and its inputs and outputs."""

    def __init__(self) -> None:
        self.layers: list[QuantisedPack] = []
        self.kept: list[tuple[int, Tensor, Tensor]] = []

    def pack(self, bundle: LinearBundle, case: KernelCase) -> QuantisedPack:
        self.layers.append(super().pack(bundle, case))
        return self.layers[-1]

    def apply(self, x: Tensor, packed: QuantisedPack) -> Tensor:
        y = super().apply(x, packed)
        self.kept.append((next(i for i, layer in enumerate(self.layers) if layer is packed), x, y))
        return y


@contextmanager
def registered(linear: Kernel, *gated: Merged | DequantisedGated) -> Iterator[Kernel]:
    """``linear`` before all other kernels, and ``gated`` before all other ones of gated layers."""
    for one in gated:
        register_gated(one)
    register_linear(linear)
    try:
        yield linear
    finally:
        for kernel in (linear, *gated):
            withdraw(kernel)


WEIGHTS_ONLY = [name for name, model in MODELS.items() if not model.activation]
PAIRS = [(name, 'LlamaForCausalLM') for name in WEIGHTS_ONLY]
PAIRS += [(name, arch) for name in ('awq', 'gptq-act', 'gptq-act-own', 'packed-3', 'float8-weights')
          for arch in ('InternLM2ForCausalLM', 'Qwen2ForCausalLM')]  # packed q, k and v; biases and tied embeddings


@pytest.mark.parametrize(('name', 'arch'), PAIRS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_dense_model(tiny: Path, tmp_path: Path, name: str, arch: str,
                                              dtype: torch.dtype) -> None:
    """To the last bit: dequantising rounds once, as loading the dense weights does."""
    packed, dense = write_pair(source(tiny, arch), tmp_path, MODELS[name])
    with registered(Dequantised(), DequantisedGated()):
        found = logits(packed, dtype)
    assert torch.equal(found, logits(dense, dtype))


ACTIVE = [(name, 'LlamaForCausalLM') for name, model in MODELS.items() if model.activation]
ACTIVE += [(name, arch) for name in ('w4a8', 'fp8-block', 'smooth-int8')
           for arch in ('InternLM2ForCausalLM', 'Qwen2ForCausalLM')]


@pytest.mark.parametrize(('name', 'arch'), ACTIVE)
def test_inputs_are_quantised_as_the_scheme_says(tiny: Path, tmp_path: Path, name: str, arch: str) -> None:
    """Every product of the model, against the dense weights and inputs that are rounded here."""
    model = MODELS[name]
    packed, dense = write_pair(source(tiny, arch), tmp_path, model)
    with registered(Weights(), Merged()) as weights:
        load_model(dense)
    with registered(Products()) as products:
        logits(packed)
    assert [i for i, _, _ in products.kept] == list(range(8))  # qkv, o, gate and up, down, twice; not the head
    for i, x, y in products.kept:
        weight, bias = weights.kept[i]
        wanted = F.linear(rounded(x, model).double(), weight.double(), None if bias is None else bias.double())
        allowed = tolerance(torch.float32, float(wanted.abs().max()), x.shape[1])
        torch.testing.assert_close(y.double(), wanted, **allowed)
        gap = (F.linear(x, weight, bias) - y).abs().max()
        assert gap > 20 * allowed['atol']


def edit(folder: Path, change: dict[str, Tensor | None]) -> Path:
    """Change tensors of a folder; None takes one out."""
    tensors = load_file(folder / 'model.safetensors') | change
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / 'model.safetensors')
    return folder


def refused(folder: Path) -> tuple[LoadError, bool]:
    """The error of loading, and whether a tensor had been read by then."""
    with open_checkpoint(folder) as checkpoint:
        model = build_model(ModelConfig.from_dict(checkpoint.config), Build())
        with pytest.raises(LoadError) as caught:
            model.load(checkpoint.prefix())
        return caught.value, checkpoint.leftover() != checkpoint.names()


@pytest.mark.parametrize(('layer', 'parts'), [
    ('model.layers.1.self_attn.v_proj', 3),
    ('model.layers.1.mlp.up_proj', 2),
])
def test_parts_of_one_layer_must_be_stored_alike(tiny: Path, tmp_path: Path, layer: str, parts: int) -> None:
    packed, dense = write_pair(source(tiny), tmp_path, MODELS['awq'])
    weight = load_file(dense / 'model.safetensors')[f'{layer}.weight']
    edit(packed, {f'{layer}.{name}': None for name in ('qweight', 'qzeros', 'scales')} | {f'{layer}.weight': weight})
    error, read = refused(packed)
    assert error.code == 'LMD-141' and not read
    assert layer in str(error) and error.params['layers'].count(',') == parts - 1
    assert 'stored as int4 in groups of 16, asymmetric beside dense' in str(error)
    assert '并存' in error.text('zh')


def test_what_headers_tell_is_refused_before_a_tensor_is_read(tiny: Path, tmp_path: Path) -> None:
    folder = source(tiny)
    layer = 'model.layers.1.mlp.down_proj'
    for i, (change, code) in enumerate((
        ({f'{layer}.scales': torch.ones(4, 48)}, 'LMD-133'),
        ({f'{layer}.qweight': torch.ones(96, 6, dtype=torch.int32), f'{layer}.qzeros': torch.ones(6, 6).int(),
          f'{layer}.scales': torch.ones(6, 48)}, 'LMD-133'),
        ({f'{layer}.qzeros': None}, 'LMD-142'),
        ({f'{layer}.qweight': None, f'{layer}.qzeros': None, f'{layer}.scales': None}, 'LMD-132'),
    )):
        packed, _ = write_pair(folder, tmp_path / str(i), MODELS['awq'])
        error, read = refused(edit(packed, change))
        assert (error.code, read) == (code, False) and layer in str(error), error


def test_quantised_tensors_without_a_configuration(tiny: Path, tmp_path: Path) -> None:
    folder = source(tiny)
    for i, (name, code) in enumerate((('awq', 'LMD-132'), ('int8', 'LMD-142'))):
        packed, _ = write_pair(folder, tmp_path / str(i), MODELS[name])
        config = json.loads((packed / 'config.json').read_text())
        (packed / 'config.json').write_text(json.dumps({k: v for k, v in config.items() if k != 'quantization_config'}))
        error, read = refused(packed)
        assert (error.code, read) == (code, False)


def test_layers_that_are_said_to_be_dense_must_be(tiny: Path, tmp_path: Path) -> None:
    model = Model(MODELS['awq'].write, MODELS['awq'].config | {'modules_to_not_convert': ['layers.1.mlp']})
    packed, _ = write_pair(source(tiny), tmp_path, model)
    error, read = refused(packed)
    assert error.code == 'LMD-142' and not read and 'model.layers.1.mlp.gate_proj' in str(error)
    assert 'qweight (I32)' in str(error) and '其张量为' in error.text('zh')
