"""Kernels of quantised weights on CPUs: the codes stay as small as they are, see :mod:`lmdeploy.ops.cpu.int4`, int8."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.ops.cpu import features, int4, int8
from lmdeploy.ops.quantize import LARGEST, quantize_static, quantize_tokens
from lmdeploy.quant.blocks import four_bits
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels.base import KernelCase
from lmdeploy.weights.dequant import FOUR_BITS

NO_DOT = 'needs instructions for products of 8-bit integers (VNNI)'


class Int4:
    """Codes of up to 4 bits in groups, and GGUF blocks of such codes; of 2 and 3 bits they are kept in 4.

    Scales and offsets are rounded to bfloat16 (by 2^-8 of each at most), and weights where many rows are multiplied.
    """

    name = 'cpu_int4'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = _refuse(case)
        if case.scheme.activation:
            reasons.append('does not quantise inputs')
        return reasons + _refuse_int4(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> int4.Int4Weight:
        return pack_int4(bundle)

    def apply(self, x: Tensor, packed: int4.Int4Weight) -> Tensor:
        return int4.int4_linear(x, packed)

    def apply_float(self, x: Tensor, packed: int4.Int4Weight) -> Tensor:
        return int4.int4_linear(x, packed).float()

    def rounds(self, case: KernelCase) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Wide:
    """A weight, its bias ``[out] float32``, and the order in which it wants its inputs, or None."""

    weight: int8.Int8Product
    bias: Tensor | None
    perm: Tensor | None


class WideInt8:
    """Codes of 8 bits with one scale for each output, by products of integers."""

    name = 'onednn_int8_wide'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = _refuse(case)
        if not features.int8_dot():
            reasons.append(NO_DOT)
        if case.scheme.activation:
            reasons.append('does not quantise inputs')
        return reasons + _refuse_int8(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> Wide:
        return Wide(_product(bundle), _bias(bundle, torch.float32), bundle.perm)

    def apply(self, x: Tensor, packed: Wide) -> Tensor:
        return self.apply_float(x, packed).to(x.dtype)

    def apply_float(self, x: Tensor, packed: Wide) -> Tensor:
        y = int8.wide_product(x if packed.perm is None else x[:, packed.perm], packed.weight)
        return y if packed.bias is None else y.add_(packed.bias)

    def rounds(self, case: KernelCase) -> bool:
        return False


class Int8:
    """Codes of 8 bits with one scale for each output, where products of integers are slow."""

    name = 'cpu_int8'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = _refuse(case)
        if case.scheme.activation:
            reasons.append('does not quantise inputs')
        return reasons + _refuse_int8(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> int8.Int8Weight:
        assert bundle.codes is not None and bundle.scales is not None
        packed = int8.pack_int8(bundle.codes.t(), bundle.scales[0])
        packed.bias, packed.perm = _bias(bundle, torch.bfloat16), bundle.perm
        return packed

    def apply(self, x: Tensor, packed: int8.Int8Weight) -> Tensor:
        return int8.int8_linear(x, packed)

    def apply_float(self, x: Tensor, packed: int8.Int8Weight) -> Tensor:
        return int8.int8_linear(x, packed).float()

    def rows(self, ids: Tensor, packed: int8.Int8Weight) -> Tensor:
        return packed.rows(ids)

    def rounds(self, case: KernelCase) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight, what its inputs are quantised to, their one scale if they have one, and a bias ``[out] float32``."""

    weight: int4.Int4Weight | int8.Int8Product
    activation: str
    input_scale: Tensor | None
    bias: Tensor | None
    perm: Tensor | None = None

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of ``x``."""
        if self.perm is not None:
            x = x[:, self.perm]
        if self.input_scale is None:
            return quantize_tokens(x, self.activation, 0)
        return quantize_static(x, self.activation, self.input_scale), self.input_scale


class Int8Inputs:
    """8-bit codes on both sides, one scale for each output and each token: products of integers."""

    name = 'onednn_int8'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = []
        if case.device.type != 'cpu':
            reasons.append('runs on cpu')
        if not features.int8_dot():
            reasons.append(NO_DOT)
        if case.scheme.activation != 'int8' or case.scheme.activation_group:
            reasons.append('quantises inputs to int8, token by token')
        return reasons + _refuse_int8(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> Quantised:
        return Quantised(_product(bundle), 'int8', bundle.input_scale, _bias(bundle, torch.float32), bundle.perm)

    def apply(self, x: Tensor, packed: Quantised) -> Tensor:
        return self.apply_float(x, packed).to(x.dtype)

    def apply_float(self, x: Tensor, packed: Quantised) -> Tensor:
        assert isinstance(packed.weight, int8.Int8Product)
        codes, scales = packed.codes(x)
        y = int8.int8_product(codes, packed.weight).mul_(scales)
        return y if packed.bias is None else y.add_(packed.bias)

    def rounds(self, case: KernelCase) -> bool:
        return False


class Int4Inputs:
    """Codes of up to 4 bits times inputs of 8, which bfloat16 holds exactly: the product of :class:`Int4` with them."""

    name = 'cpu_int4_inputs'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = _refuse(case)
        if case.scheme.activation not in LARGEST or case.scheme.activation_group:
            reasons.append(f'quantises inputs to {", ".join(LARGEST)}, token by token')
        return reasons + _refuse_int4(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> Quantised:
        weight = pack_int4(replace(bundle, bias=None))
        return Quantised(weight, case.scheme.activation, bundle.input_scale, _bias(bundle, torch.float32))

    def apply(self, x: Tensor, packed: Quantised) -> Tensor:
        return self.apply_float(x, packed).to(x.dtype)

    def apply_float(self, x: Tensor, packed: Quantised) -> Tensor:
        assert isinstance(packed.weight, int4.Int4Weight)
        codes, scales = packed.codes(x)
        y = int4.int4_linear(codes.to(x.dtype), packed.weight).float().mul_(scales)
        return y if packed.bias is None else y.add_(packed.bias)

    def rounds(self, case: KernelCase) -> bool:
        return True


def keeps_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether GGUF blocks are multiplied here without becoming a dense weight first."""
    return device.type == 'cpu' and dtype is torch.bfloat16 and features.packed_codes()


def pack_int4(bundle: LinearBundle) -> int4.Int4Weight:
    """What :class:`Int4` multiplies with, of any bundle that it takes."""
    if bundle.scheme.name in FOUR_BITS:
        blocks = four_bits(bundle)
        packed = int4.pack_int4(blocks.codes, blocks.scales, 8 * blocks.scales - blocks.minima, bundle.scheme.group)
    else:
        assert bundle.codes is not None and bundle.scales is not None
        codes, scales = bundle.codes.t(), bundle.scales.float()
        if bundle.zeros is None:
            packed = int4.pack_int4((codes + 8).view(torch.uint8), scales, None, bundle.scheme.group)
        else:
            packed = int4.pack_int4(codes, scales, (8 - bundle.zeros) * scales, bundle.scheme.group)
    packed.bias, packed.perm = _bias(bundle, torch.bfloat16), bundle.perm
    return packed


def _product(bundle: LinearBundle) -> int8.Int8Product:
    assert bundle.codes is not None and bundle.scales is not None
    return int8.pack_product(bundle.codes.t(), bundle.scales[0])


def _bias(bundle: LinearBundle, dtype: torch.dtype) -> Tensor | None:
    return None if bundle.bias is None else bundle.bias.to(dtype)


def _refuse(case: KernelCase) -> list[str]:
    reasons = []
    if case.device.type != 'cpu':
        reasons.append('runs on cpu')
    if case.dtype is not torch.bfloat16:
        reasons.append(f'computes in bfloat16, not in {case.dtype}')
    if not features.packed_codes():
        reasons.append('needs AVX2, AVX512 or NEON')
    return reasons


def _refuse_int4(case: KernelCase) -> list[str]:
    scheme = case.scheme
    if scheme.name not in FOUR_BITS and (scheme.name != 'int' or scheme.bits > 4):
        return [f'needs integers of at most 4 bits or {", ".join(sorted(FOUR_BITS))}']
    if not int4.group_for(scheme.group, case.in_features):
        return [f'needs groups of a multiple of {int4.GROUPS[-1]} channels, not of {scheme.group}']
    return []


def _refuse_int8(case: KernelCase) -> list[str]:
    scheme = case.scheme
    if scheme.name != 'int' or scheme.bits != 8 or scheme.group or not scheme.symmetric:
        return ['needs symmetric integers of 8 bits with one scale for each output']
    return []
