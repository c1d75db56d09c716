"""Every quantised format on a GPU: which kernel is chosen, and that it multiplies as the reference does."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.bench.shapes import QUANTISED
from lmdeploy.config.quantization import read_quantization
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels import KernelCase, choose_gated, choose_kernel
from lmdeploy.quant.kernels.dequantised import DequantisedGated, Merged, QuantisedInput
from lmdeploy.quant.rounding import round_weight

pytestmark = pytest.mark.gpu
ROWS = (1, 5, 33, 64, 65, 200, 300, 700)


def bundles(name: str, count: int) -> list[LinearBundle]:
    storage = read_quantization({'quantization_config': QUANTISED[name]}).storage('model.layers.0.mlp.up_proj')
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        bundle = round_weight(torch.randn(320, 512, generator=draw) / 512**0.5, storage, torch.float16)
        bundle.bias = torch.randn(320, generator=draw)
        made.append(bundle)
    return made


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double().cpu() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', QUANTISED)
def test_products(name, dtype):
    """Inputs in 16 bits where the reference quantises them to 8 differ from it by that rounding alone."""
    one, gate, up = bundles(name, 3)
    scheme = one.scheme
    near, far = (KernelCase(scheme, kind, torch.device(device), 320, 512)
                 for kind, device in ((torch.float32, 'cpu'), (dtype, 'cuda')))
    kernel, gated = choose_kernel(far), choose_gated(far)
    assert kernel.name.startswith('triton') and gated.name.startswith('triton')
    packed, both = kernel.pack(one, far), gated.pack(gate, up, far)
    reference = QuantisedInput() if scheme.activation else choose_kernel(near)
    joint = Merged() if scheme.activation else DequantisedGated()
    known, known_both = reference.pack(one, near), joint.pack(gate, up, near)
    rounding = 2e-3 if dtype is torch.float16 else 8e-3
    inputs = {'int8': 1e-2, 'float8_e4m3fn': 4e-2}.get(scheme.activation, 0.0)
    for rows in ROWS:
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).to(dtype)
        wanted = reference.apply_float(x.float(), known)
        assert off(kernel.apply(x.cuda(), packed), wanted) < rounding + inputs, rows
        assert off(kernel.apply_float(x.cuda(), packed), wanted) < 2e-3 + inputs, rows
        wanted = joint.apply(x.float(), known_both, 'silu')
        assert off(gated.apply(x.cuda(), both, 'silu'), wanted) < 2 * rounding + 2 * inputs, rows
