"""LinearKernel: how a layer's weight is multiplied, chosen by its scheme, type and device.

Candidates are ordered; the first without a reason against it is taken. If all refuse, the error says why each did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lmdeploy.errors import ConfigError
from lmdeploy.ops import plugins
from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.cpu import features
from lmdeploy.ops.cpu import linear as cpu
from lmdeploy.ops.linear import GATE_GROUP, gated_linear, interleave, linear, linear_float
from lmdeploy.ops.quantize import LARGEST, quantize_static, quantize_tokens
from lmdeploy.ops.table import OpCase
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.rows import join
from lmdeploy.quant.scheme import FLOAT8, QuantScheme, dense_scheme
from lmdeploy.weights.dequant import BLOCK_TYPES

SCALED = ('int', *FLOAT8)  # codes with scales beside them
KNOWN = (*SCALED, *BLOCK_TYPES)
K = TypeVar('K', 'LinearKernel', 'GatedKernel')


@dataclass(frozen=True, slots=True)
class KernelCase:
    """What a choice depends on; ``dtype`` is that of the activations, ``out_features`` (0: any) those of one part."""

    scheme: QuantScheme
    dtype: torch.dtype
    device: torch.device
    out_features: int = 0


class LinearKernel(Protocol):
    """One way of multiplying. ``pack`` turns a bundle into what ``apply`` wants, on the device, once."""

    name: str

    def refuse(self, case: KernelCase) -> list[str]: ...

    def pack(self, bundle: LinearBundle, case: KernelCase) -> Any: ...

    def apply(self, x: Tensor, packed: Any) -> Tensor: ...

    def apply_float(self, x: Tensor, packed: Any) -> Tensor:
        """The product in float32, which logits are; see :attr:`rounds`."""
        ...

    def rounds(self, case: KernelCase) -> bool:
        """Whether ``apply_float`` rounds to the type of the activations on its way."""
        ...


class PackedDense:
    """oneDNN on the CPU, see :mod:`lmdeploy.ops.cpu.linear`."""

    name = 'onednn_packed'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_packed(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> cpu.PackedWeight:
        weight, bias = _dense(bundle, case)
        return cpu.pack(weight, bias)

    def apply(self, x: Tensor, packed: cpu.PackedWeight) -> Tensor:
        return cpu.packed_linear(x, packed)

    def apply_float(self, x: Tensor, packed: cpu.PackedWeight) -> Tensor:
        return cpu.packed_linear(x, packed).float()

    def rounds(self, case: KernelCase) -> bool:
        return case.dtype.itemsize < 4


class Dense:
    """The op table's product, on any device: torch's own, and one for few rows on a GPU."""

    name = 'torch'

    def refuse(self, case: KernelCase) -> list[str]:
        return [] if case.scheme.dense else ['needs a dense weight']

    def pack(self, bundle: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
        return _dense(bundle, case)

    def apply(self, x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
        return linear(x, *packed)

    def apply_float(self, x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
        return linear_float(x, *packed)

    def rounds(self, case: KernelCase) -> bool:
        return case.dtype.itemsize < 4 and linear_float.falls_back(OpCase(case.device.type, case.dtype))


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
        inner = _dense_case(case, case.dtype)
        kernel = choose_kernel(inner)
        return kernel, kernel.pack(_dequantised(bundle, inner), inner)

    def apply(self, x: Tensor, packed: tuple[LinearKernel, Any]) -> Tensor:
        kernel, weights = packed
        return kernel.apply(x, weights)

    def apply_float(self, x: Tensor, packed: tuple[LinearKernel, Any]) -> Tensor:
        kernel, weights = packed
        return kernel.apply_float(x, weights)

    def rounds(self, case: KernelCase) -> bool:
        inner = _dense_case(case, case.dtype)
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
        inner = _dense_case(case, torch.bfloat16 if case.dtype is torch.bfloat16 else torch.float32)
        scale = None
        plain = replace(bundle, bias=None)
        if bundle.scheme.name in SCALED and not bundle.scheme.group:
            assert bundle.scales is not None
            scale = bundle.scales[0].to(case.device, torch.float32)
            plain = replace(plain, scales=torch.ones_like(bundle.scales))
        kernel = choose_kernel(inner)
        weights = kernel.pack(_dequantised(plain, inner), inner)
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


class GatedKernel(Protocol):
    """One way of computing ``activation(gate(x)) * up(x)``, for the activations of ``ops.activation.ACTIVATIONS``."""

    name: str

    def refuse(self, case: KernelCase) -> list[str]: ...

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> Any: ...

    def apply(self, x: Tensor, packed: Any, activation: str) -> Tensor: ...


class PackedGated:
    """oneDNN with the activation and the product as epilogues of the two multiplications."""

    name = 'onednn_gated'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_packed(case)

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[cpu.PackedWeight, cpu.PackedWeight]:
        return cpu.pack(*_dense(gate, case)), cpu.pack(*_dense(up, case))

    def apply(self, x: Tensor, packed: tuple[cpu.PackedWeight, cpu.PackedWeight], activation: str) -> Tensor:
        return cpu.packed_gated(x, *packed, activation)


class Interleaved:
    """One product with the rows of gate and up interleaved, and the activation in its epilogue where rows are few."""

    name = 'interleaved'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = []
        if not case.scheme.dense:
            reasons.append('needs a dense weight')
        if gated_linear.falls_back(OpCase(case.device.type, case.dtype)):
            reasons.append(f'no kernel for {case.dtype} on {case.device.type}')
        if case.out_features % GATE_GROUP:
            reasons.append(f'needs a multiple of {GATE_GROUP} channels')
        return reasons

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
        (gate_weight, gate_bias), (up_weight, up_bias) = _dense(gate, case), _dense(up, case)
        weight = interleave(gate_weight, up_weight)
        if gate_bias is None and up_bias is None:
            return weight, None
        nothing = weight.new_zeros(gate.out_features)
        return weight, interleave(*(nothing if bias is None else bias for bias in (gate_bias, up_bias)))

    def apply(self, x: Tensor, packed: tuple[Tensor, Tensor | None], activation: str) -> Tensor:
        return gated_linear(x, *packed, activation)


class DequantisedGated:
    """As :class:`Dequantised`, for the two gated layers."""

    name = 'dequantised'

    def refuse(self, case: KernelCase) -> list[str]:
        return Dequantised().refuse(case)

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[GatedKernel, Any]:
        inner = _dense_case(case, case.dtype)
        kernel = choose_gated(inner)
        return kernel, kernel.pack(_dequantised(gate, inner), _dequantised(up, inner), inner)

    def apply(self, x: Tensor, packed: tuple[GatedKernel, Any], activation: str) -> Tensor:
        kernel, weights = packed
        return kernel.apply(x, weights, activation)


class Merged:
    """Gate and up as one layer of whatever kernel suits them, then the activation as an op."""

    name = 'merged'

    def refuse(self, case: KernelCase) -> list[str]:
        return []

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[LinearKernel, Any]:
        kernel = choose_kernel(case)
        return kernel, kernel.pack(join((gate, up)), case)

    def apply(self, x: Tensor, packed: tuple[LinearKernel, Any], activation: str) -> Tensor:
        kernel, weights = packed
        return ACTIVATIONS[activation](kernel.apply(x, weights))


LINEAR: list[LinearKernel] = [PackedDense(), Dense(), Dequantised(), QuantisedInput()]
GATED: list[GatedKernel] = [PackedGated(), Interleaved(), DequantisedGated(), Merged()]


def register_linear(kernel: LinearKernel) -> LinearKernel:
    """Put ``kernel`` before all present ones for linear layers."""
    LINEAR.insert(0, kernel)
    return kernel


def register_gated(kernel: GatedKernel) -> GatedKernel:
    """Put ``kernel`` before all present ones for the two gated layers of an MLP."""
    GATED.insert(0, kernel)
    return kernel


def withdraw(kernel: LinearKernel | GatedKernel) -> None:
    """Take a kernel out of the candidates."""
    LINEAR[:] = [one for one in LINEAR if one is not kernel]
    GATED[:] = [one for one in GATED if one is not kernel]


def explain(case: KernelCase) -> str:
    """One line per kernel, those of linear layers and then those of gated ones: chosen, ready, or reasons against."""
    return '\n'.join((*_states('linear layer', LINEAR, case), *_states('gated layers', GATED, case)))


def _states(kind: str, kernels: Sequence[K], case: KernelCase) -> Iterator[str]:
    plugins.load()
    chosen = False
    for kernel in kernels:
        against = kernel.refuse(case)
        yield f'{kind}: {kernel.name}: {"; ".join(against) if against else "ready" if chosen else "chosen"}'
        chosen = chosen or not against


def choose_kernel(case: KernelCase) -> LinearKernel:
    """The first kernel of a linear layer that does not refuse.

    Raises:
        ConfigError: LMD-118, with every candidate's reasons.
    """
    return _choose(LINEAR, case)


def choose_gated(case: KernelCase) -> GatedKernel:
    """The first kernel of the two gated layers of an MLP that does not refuse; as :func:`choose_kernel`."""
    return _choose(GATED, case)


def _choose(kernels: Sequence[K], case: KernelCase) -> K:
    plugins.load()
    reasons = []
    for kernel in kernels:
        against = kernel.refuse(case)
        if not against:
            return kernel
        reasons.append(f'{kernel.name}: {", ".join(against)}')
    raise ConfigError('LMD-118', scheme=case.scheme.name, device=case.device, reasons='; '.join(reasons))


def _refuse_packed(case: KernelCase) -> list[str]:
    reasons = []
    if case.device.type != 'cpu':
        reasons.append('runs on cpu')
    if not case.scheme.dense:
        reasons.append('needs a dense weight')
    if not features.packed_linear(case.dtype):
        reasons.append(f'oneDNN does not multiply {case.dtype} here')
    return reasons


def _dense(bundle: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
    if bundle.weight is None:
        raise TypeError(f'a bundle of scheme {bundle.scheme.name} has no dense weight')
    bias = bundle.bias
    return bundle.weight.to(case.device, case.dtype), None if bias is None else bias.to(case.device, case.dtype)


def _dense_case(case: KernelCase, dtype: torch.dtype) -> KernelCase:
    return replace(case, scheme=dense_scheme(dtype.itemsize * 8), dtype=dtype)


def _dequantised(bundle: LinearBundle, case: KernelCase) -> LinearBundle:
    """The dense bundle of ``case`` that a quantised one stands for."""
    if bundle.input_transform:
        raise TypeError(f'no kernel transforms inputs by {bundle.input_transform}')
    weight = dequantize_bundle(bundle, case.dtype)
    return LinearBundle(case.scheme, bundle.out_features, bundle.in_features, weight=weight, bias=bundle.bias)
