"""Norms and activations quantise what the layer behind them wants quantised, and the model computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.quantize import CodesOf, TokenCodes, quantize_tokens, turn
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels import KernelCase, QuantisedInput, QuantisedPack, register_gated, register_linear, withdraw
from lmdeploy.quant.rows import join
from tests.models.driver import Driver, load_model
from tests.models.tiny import VOCAB, make_tiny
from tests.quant.formats.folders import MODELS, write_pair

IDS = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(0)).tolist()


@dataclass
class Takes(QuantisedInput):
    """The reference, of which others may quantise the inputs; counts where they come from."""

    turned: bool = False
    above: int = 0
    given: int = 0
    own: int = 0

    def takes(self, packed: QuantisedPack) -> CodesOf:
        return CodesOf(packed.scheme.activation, packed.scheme.activation_group, self.turned, self.above)

    def apply(self, x: Tensor, packed: QuantisedPack) -> Tensor:
        self.own += 1
        return super().apply(x, packed)

    def apply_codes(self, x: TokenCodes, packed: QuantisedPack, dtype: torch.dtype) -> Tensor:
        self.given += 1
        assert packed.scale is not None and len(x.codes) > self.above
        codes = x.codes
        for _ in range(2 if self.turned else 0):  # three times is once around
            codes = turn(codes)
        y = packed.kernel.apply(codes.to(packed.dtype), packed.weights).float() * x.scales * packed.scale
        return (y if packed.bias is None else y + packed.bias).to(dtype)


class TakesGated:
    """Gate and up as one layer of such a kernel."""

    name = 'takes'

    def __init__(self, inner: Takes) -> None:
        self.inner = inner

    def refuse(self, case: KernelCase) -> list[str]:
        return self.inner.refuse(case)

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> QuantisedPack:
        return self.inner.pack(join((gate, up)), case)

    def apply(self, x: Tensor, packed: Any, activation: str) -> Tensor:
        gate, up = self.inner.apply(x, packed).chunk(2, -1)
        return F.silu(gate) * up

    def takes(self, packed: QuantisedPack) -> CodesOf:
        return self.inner.takes(packed)

    def apply_codes(self, x: TokenCodes, packed: Any, activation: str, dtype: torch.dtype) -> Tensor:
        gate, up = self.inner.apply_codes(x, packed, dtype).chunk(2, -1)
        return F.silu(gate) * up

    def apply_to_codes(self, x: TokenCodes, packed: Any, activation: str, dtype: torch.dtype,
                       then: CodesOf) -> TokenCodes:  # fmt: skip
        return TokenCodes(*quantize_tokens(self.apply_codes(x, packed, activation, dtype), then.kind, then.group,
                                           then.turned))  # fmt: skip


def logits(folder: Path, kernel: QuantisedInput, gated: TakesGated | None = None) -> Tensor:
    register_linear(kernel)
    if gated is not None:
        register_gated(gated)
    try:
        return Driver(load_model(folder)).sequence(IDS)
    finally:
        withdraw(kernel)
        if gated is not None:
            withdraw(gated)


@pytest.mark.parametrize(('turned', 'above'), [(False, 0), (True, 0), (False, 20)])
@pytest.mark.parametrize('name', ['smooth-int8', 'smooth-fp8'])
def test_the_same_logits(name, turned, above, tmp_path):
    source = make_tiny('LlamaForCausalLM', tmp_path / 'source', hidden_size=64, intermediate_size=96,
                       num_attention_heads=4)  # fmt: skip
    folder, _ = write_pair(source, tmp_path, MODELS[name])
    kernel = Takes(turned=turned, above=above)
    found = logits(folder, kernel, TakesGated(kernel))
    assert torch.equal(found, logits(folder, QuantisedInput()))
    layers = 2
    if above:  # no more tokens than that: every layer does it by itself
        assert (kernel.given, kernel.own) == (0, 4 * layers)
    else:  # all but the output of attention comes as codes
        assert (kernel.given, kernel.own) == (3 * layers, layers)
