"""Quantised weights as the dense ones that they stand for: the reference of every scheme."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.quantize import LARGEST, quantize_static, quantize_tokens
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels.base import KNOWN, SCALED, GatedKernel, KernelCase, LinearKernel, dense_case, dequantised
from lmdeploy.quant.kernels.choice import choose_gated, choose_kernel
from lmdeploy.quant.rows import join
from lmdeploy.quant.scheme import QuantScheme


class Dequantised:
    """Any weight-only scheme, as the dense weight that it stands for: dequantised once, when it is loaded.

    This is the reference: it runs everything at the speed of a dense model, and takes the memory of one. Kernels that
    unpack codes while they multiply go before it.
    """

    name = 'dequantised'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = []
        if case.scheme.dense:
            reasons.append('needs a quantised weight')
        elif case.scheme.name not in KNOWN:
            reasons.append(f'knows {", ".join(KNOWN)}')
        if case.scheme.activation:
            reasons.append('does not quantise inputs')
        return reasons

    def pack(self, bundle: LinearBundle, case: KernelCase) -> tuple[LinearKernel, Any]:
        inner = dense_case(case, case.dtype)
        kernel = choose_kernel(inner)
        return kernel, kernel.pack(dequantised(bundle, inner), inner)

    def apply(self, x: Tensor, packed: tuple[LinearKernel, Any]) -> Tensor:
        kernel, weights = packed
        return kernel.apply(x, weights)

    def apply_float(self, x: Tensor, packed: tuple[LinearKernel, Any]) -> Tensor:
        kernel, weights = packed
        return kernel.apply_float(x, weights)

    def rounds(self, case: KernelCase) -> bool:
        inner = dense_case(case, case.dtype)
        return choose_kernel(inner).rounds(inner)


@dataclass(frozen=True, slots=True)
class QuantisedPack:
    """What :class:`QuantisedInput` multiplies with: codes as floating-point numbers, which hold them exactly, by
    ``kernel``; ``scale [out]`` of the product (None: the weight is scaled already), ``bias [out]``, both float32."""

    scheme: QuantScheme
    kernel: LinearKernel
    weights: Any
    dtype: torch.dtype
    scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None


class QuantisedInput:
    """Inputs quantised token by token, then a dense product of codes: the reference of W8A8, W4A8 and fp8.

    Codes of 8 bits are exact in bfloat16 and float32, so with a scale per output channel the product is that of the
    integers, but for the rounding of sums. Weights whose scales change along the inputs are dequantised first, and so
    are inputs in groups. float16 is computed in float32: sums of codes do not fit it.
    """

    name = 'quantised_input'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = []
        if case.scheme.activation not in LARGEST:
            reasons.append(f'quantises inputs to {", ".join(LARGEST)}')
        if case.scheme.name not in KNOWN:
            reasons.append(f'knows {", ".join(KNOWN)}')
        return reasons

    def pack(self, bundle: LinearBundle, case: KernelCase) -> QuantisedPack:
        inner = dense_case(case, torch.bfloat16 if case.dtype is torch.bfloat16 else torch.float32)
        scale = None
        plain = replace(bundle, bias=None)
        if bundle.scheme.name in SCALED and not bundle.scheme.group:
            assert bundle.scales is not None
            scale = bundle.scales[0].to(case.device, torch.float32)
            plain = replace(plain, scales=torch.ones_like(bundle.scales))
        kernel = choose_kernel(inner)
        weights = kernel.pack(dequantised(plain, inner), inner)
        bias = None if bundle.bias is None else bundle.bias.to(case.device, torch.float32)
        given = None if bundle.input_scale is None else bundle.input_scale.to(case.device, torch.float32)
        return QuantisedPack(bundle.scheme, kernel, weights, inner.dtype, scale, bias, given)

    def apply(self, x: Tensor, packed: QuantisedPack) -> Tensor:
        return self.apply_float(x, packed).to(x.dtype)

    def apply_float(self, x: Tensor, packed: QuantisedPack) -> Tensor:
        scheme = packed.scheme
        if packed.input_scale is not None:
            codes, scales = quantize_static(x, scheme.activation, packed.input_scale), packed.input_scale
        else:
            codes, scales = quantize_tokens(x, scheme.activation, scheme.activation_group)
        if scheme.activation_group:
            spread = scales.repeat_interleave(scheme.activation_group, 1)[:, : x.shape[1]]
            y = packed.kernel.apply((codes.float() * spread).to(packed.dtype), packed.weights).float()
        else:
            y = packed.kernel.apply(codes.to(packed.dtype), packed.weights).float() * scales
        if packed.scale is not None:
            y *= packed.scale
        return y if packed.bias is None else y + packed.bias

    def rounds(self, case: KernelCase) -> bool:
        return False


class DequantisedGated:
    """As :class:`Dequantised`, for the two gated layers, where no kernel multiplies their codes."""

    name = 'dequantised'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = Dequantised().refuse(case)
        if not reasons and (kernel := choose_kernel(case)).name != Dequantised.name:
            reasons.append(f'{kernel.name} multiplies the codes')
        return reasons

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[GatedKernel, Any]:
        inner = dense_case(case, case.dtype)
        kernel = choose_gated(inner)
        return kernel, kernel.pack(dequantised(gate, inner), dequantised(up, inner), inner)

    def apply(self, x: Tensor, packed: tuple[GatedKernel, Any], activation: str) -> Tensor:
        kernel, weights = packed
        return kernel.apply(x, weights, activation)


class Merged:
    """Gate and up as one layer of whatever kernel suits them, then the activation as an op."""

    name = 'merged'

    def refuse(self, case: KernelCase) -> list[str]:
        return []

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[LinearKernel, Any]:
        joined = join((gate, up))
        inner = replace(case, scheme=joined.scheme, out_features=joined.out_features)
        kernel = choose_kernel(inner)
        return kernel, kernel.pack(joined, inner)

    def apply(self, x: Tensor, packed: tuple[LinearKernel, Any], activation: str) -> Tensor:
        kernel, weights = packed
        return ACTIVATIONS[activation](kernel.apply(x, weights))
