"""Quantised products on a GPU, at quantised speed: codes for 16-bit inputs, and 8 bits on both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.devices import HOPPER, refuse_triton
from lmdeploy.ops.linear import GATE_GROUP, interleave
from lmdeploy.ops.packed_linear import CODES, MAGIC, WIDTH, PackedWeight, pack, packed_codes_linear, packed_linear
from lmdeploy.ops.quantize import TYPES, CodesOf, TokenCodes, gate_mul_quantize, quantize_static, quantize_tokens
from lmdeploy.ops.scaled_linear import ScaledWeight, scaled_linear
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels.base import SCALED, KernelCase
from lmdeploy.quant.scheme import FLOAT8

# tokens whose inputs W4A8 leaves exact: on an H200 the integers gained nothing at 256 (276 us a layer of 8B instead of
# 257), and beyond it cuBLAS multiplies the dense weight
EXACT_ROWS = 1 << 30


@dataclass(frozen=True, slots=True)
class Sorted:
    """Packed codes, the order in which they want their input channels, or None, and whether more than EXACT_ROWS inputs
    are quantised to 8 bits."""

    weight: PackedWeight
    order: Tensor | None
    by_codes: bool

    def takes(self) -> CodesOf | None:
        return CodesOf('int8', 0, True, EXACT_ROWS) if self.by_codes and self.order is None else None

    def __call__(self, x: Tensor, activation: str, exact: bool) -> Tensor:
        x = x if self.order is None else x.index_select(-1, self.order)
        if self.by_codes and len(x) > EXACT_ROWS:
            codes, scales = quantize_tokens(x, 'int8', 0, True)
            return packed_codes_linear(codes, scales, self.weight, activation, torch.float32 if exact else x.dtype)
        return packed_linear(x, self.weight, activation, exact)


class PackedProduct:
    """Integer and float8 codes, unpacked while they are multiplied with 16-bit inputs.

    W4A8 is among them: inputs stay exact up to EXACT_ROWS, beyond which they are quantised to 8 bits.
    """

    name = 'triton_packed'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_packed(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> Sorted:
        return _packed(bundle, case)

    def apply(self, x: Tensor, packed: Sorted) -> Tensor:
        return packed(x, '', False)

    def apply_float(self, x: Tensor, packed: Sorted) -> Tensor:
        return packed(x, '', True)

    def rounds(self, case: KernelCase) -> bool:
        return False

    def takes(self, packed: Sorted) -> CodesOf | None:
        return packed.takes()

    def apply_codes(self, x: TokenCodes, packed: Sorted, dtype: torch.dtype) -> Tensor:
        return packed_codes_linear(*x, packed.weight, '', dtype)


class PackedGatedProduct:
    """As :class:`PackedProduct`, the rows of gate and up interleaved and the activation in the product's epilogue.

    Two layers that sort their inputs differently stay two products.
    """

    name = 'triton_packed'

    def refuse(self, case: KernelCase) -> list[str]:
        return [*_refuse_packed(case), *_refuse_width(case)]

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[Sorted, ...]:
        alike = gate.perm is up.perm or (
            gate.perm is not None and up.perm is not None and torch.equal(gate.perm, up.perm))  # fmt: skip
        if not alike:
            return _packed(gate, case), _packed(up, case)
        return (_packed(interleaved(gate, up), case, gated=True),)

    def apply(self, x: Tensor, packed: tuple[Sorted, ...], activation: str) -> Tensor:
        if len(packed) == 1:
            return packed[0](x, activation, False)
        return ACTIVATIONS[activation](torch.cat([one(x, '', False) for one in packed], -1))

    def takes(self, packed: tuple[Sorted, ...]) -> CodesOf | None:
        return packed[0].takes() if len(packed) == 1 else None

    def apply_codes(self, x: TokenCodes, packed: tuple[Sorted, ...], activation: str, dtype: torch.dtype) -> Tensor:
        return packed_codes_linear(*x, packed[0].weight, activation, dtype)

    def apply_to_codes(self, x: TokenCodes, packed: tuple[Sorted, ...], activation: str, dtype: torch.dtype,
                       then: CodesOf) -> TokenCodes:  # fmt: skip
        both = packed_codes_linear(*x, replace(packed[0].weight, gated=False), '', dtype)
        return TokenCodes(*gate_mul_quantize(both, activation, True, then.kind, then.group, then.turned))


@dataclass(frozen=True, slots=True)
class ScaledLayer:
    """A weight of 8 bits and how its inputs are quantised; see ``QuantScheme``."""

    weight: ScaledWeight
    kind: str
    group: int
    input_scale: Tensor | None

    def codes(self, x: Tensor) -> TokenCodes:
        if self.input_scale is not None:
            return TokenCodes(quantize_static(x, self.kind, self.input_scale), self.input_scale.expand(len(x), 1))
        return TokenCodes(*quantize_tokens(x, self.kind, self.group))

    def takes(self) -> CodesOf | None:
        return None if self.input_scale is not None else CodesOf(self.kind, self.group)


class ScaledProduct:
    """Codes of 8 bits on both sides: W8A8 in integers or float8, with scales per channel or per group of 128 inputs."""

    name = 'triton_scaled'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_scaled(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> ScaledLayer:
        return _scaled(bundle, case)

    def apply(self, x: Tensor, packed: ScaledLayer) -> Tensor:
        return self.apply_codes(packed.codes(x), packed, x.dtype)

    def apply_float(self, x: Tensor, packed: ScaledLayer) -> Tensor:
        return self.apply_codes(packed.codes(x), packed, torch.float32)

    def takes(self, packed: ScaledLayer) -> CodesOf | None:
        return packed.takes()

    def apply_codes(self, x: TokenCodes, packed: ScaledLayer, dtype: torch.dtype) -> Tensor:
        return scaled_linear(*x, packed.weight, '', dtype)

    def rounds(self, case: KernelCase) -> bool:
        return False


class ScaledGatedProduct:
    """As :class:`ScaledProduct`, the rows of gate and up interleaved."""

    name = 'triton_scaled'

    def refuse(self, case: KernelCase) -> list[str]:
        return [*_refuse_scaled(case), *_refuse_width(case)]

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> ScaledLayer:
        return _scaled(interleaved(gate, up), case, gated=True)

    def apply(self, x: Tensor, packed: ScaledLayer, activation: str) -> Tensor:
        return self.apply_codes(packed.codes(x), packed, activation, x.dtype)

    def takes(self, packed: ScaledLayer) -> CodesOf | None:
        return packed.takes()

    def apply_codes(self, x: TokenCodes, packed: ScaledLayer, activation: str, dtype: torch.dtype) -> Tensor:
        return scaled_linear(*x, packed.weight, activation, dtype)

    def apply_to_codes(self, x: TokenCodes, packed: ScaledLayer, activation: str, dtype: torch.dtype,
                       then: CodesOf) -> TokenCodes:  # fmt: skip
        both = scaled_linear(*x, replace(packed.weight, gated=False), '', dtype)
        return TokenCodes(*gate_mul_quantize(both, activation, True, then.kind, then.group, then.turned))


def interleaved(gate: LinearBundle, up: LinearBundle) -> LinearBundle:
    """One bundle of two with equal inputs, their output channels in the order of ``ops.linear.gated_linear``."""
    assert gate.codes is not None and up.codes is not None and gate.scales is not None and up.scales is not None
    bias = None
    if gate.bias is not None or up.bias is not None:
        nothing = gate.scales.new_zeros(gate.out_features)
        bias = interleave(*(nothing if one.bias is None else one.bias for one in (gate, up)))
    zeros = None if gate.zeros is None or up.zeros is None else interleave(gate.zeros.t(), up.zeros.t()).t()
    return replace(gate, out_features=2 * gate.out_features, codes=interleave(gate.codes.t(), up.codes.t()).t(),
                   scales=interleave(gate.scales.t(), up.scales.t()).t(), zeros=zeros, bias=bias)  # fmt: skip


def _packed(bundle: LinearBundle, case: KernelCase, *, gated: bool = False) -> Sorted:
    assert bundle.codes is not None and bundle.scales is not None
    scheme, device = bundle.scheme, case.device
    zeros = None if bundle.zeros is None else bundle.zeros.to(device)
    bias = None if bundle.bias is None else bundle.bias.to(device, case.dtype)
    weight = pack(bundle.codes.to(device), bundle.scales.to(device), zeros, bias, scheme.bits, scheme.group, case.dtype,
                  float8=scheme.name if scheme.name in FLOAT8 else '', gated=gated)  # fmt: skip
    by_codes = (scheme.activation, scheme.bits, scheme.static) == ('int8', 4, False) and scheme.group > 0 and not (
        scheme.group % 128 or bundle.in_features % 16)  # fmt: skip
    return Sorted(weight, None if bundle.perm is None else bundle.perm.to(device), by_codes)


def _scaled(bundle: LinearBundle, case: KernelCase, *, gated: bool = False) -> ScaledLayer:
    assert bundle.codes is not None and bundle.scales is not None
    scheme, device = bundle.scheme, case.device
    bias = None if bundle.bias is None else bundle.bias.to(device, torch.float32)
    weight = ScaledWeight(bundle.codes.to(device).t().contiguous(),
                          bundle.scales.to(device, torch.float32).contiguous(), bias, scheme.group, gated)  # fmt: skip
    given = None if bundle.input_scale is None else bundle.input_scale.to(device, torch.float32)
    return ScaledLayer(weight, scheme.activation, scheme.activation_group, given)


def _refuse_packed(case: KernelCase) -> list[str]:
    scheme, reasons = case.scheme, []
    if case.dtype not in MAGIC:
        reasons.append('needs inputs of 16 bits')
    if scheme.name not in SCALED or scheme.bits not in CODES:
        reasons.append(f'knows integers of {min(CODES)} to {max(CODES)} bits, and float8')
    if scheme.group % WIDTH:
        reasons.append(f'needs groups of a multiple of {WIDTH}')
    if scheme.activation and scheme.bits == 8:
        reasons.append('does not quantise inputs')  # those of narrower weights may stay exact: that is no slower
    if case.in_features % 8:
        reasons.append('needs a multiple of 8 inputs')
    return reasons or refuse_triton(case.device, HOPPER)


def _refuse_scaled(case: KernelCase) -> list[str]:
    scheme, reasons = case.scheme, []
    if scheme.activation not in TYPES:
        reasons.append(f'quantises inputs to {", ".join(TYPES)}')
    if ('int8' if (scheme.name, scheme.bits) == ('int', 8) else scheme.name) != scheme.activation:
        reasons.append('needs a weight of the type of inputs')
    if not scheme.symmetric:
        reasons.append('knows no zero points')
    if scheme.group not in (0, 128) or scheme.activation_group not in (0, scheme.group):
        reasons.append('needs one scale per channel, or groups of 128')
    if case.in_features % 16:
        reasons.append('needs a multiple of 16 inputs')
    return reasons or refuse_triton(case.device, HOPPER)


def _refuse_width(case: KernelCase) -> list[str]:
    return [f'needs a multiple of {GATE_GROUP} channels'] if case.out_features % GATE_GROUP else []
