"""compressed-tensors: packed integers of 2 to 8 bits, int8 and float8, each with or without quantised inputs.

Packed: ``weight_packed [out, in * bits / 32] int32``, a stream of codes along the inputs, ``weight_scale [out,
groups]``, ``weight_shape [2]``; where asymmetric ``weight_zero_point [out * bits / 32, groups] int32``, a stream along
the outputs; with act-order ``weight_g_idx [in]``. Codes and zero points are stored from 0. The other two are
:class:`~lmdeploy.quant.formats.scaled.ScaledFormat` with ``weight_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.formats.base import (
    FLOATS,
    Layout,
    Shape,
    centred,
    check_transform,
    expect,
    load_bias,
    scheme_of,
    uncentred,
    unlike,
    with_bias,
)
from lmdeploy.quant.formats.scaled import INPUT_SCALE, ScaledFormat
from lmdeploy.quant.order import groups_of, order_of, ordered, unordered
from lmdeploy.quant.packing import pack, unpack, words_for
from lmdeploy.weights.checkpoint import Prefix

WEIGHT, SCALE, SHAPE = 'weight_packed', 'weight_scale', 'weight_shape'
ZEROS, ORDER = 'weight_zero_point', 'weight_g_idx'
MAX_SIZE = 1 << 31


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """The first of the module's; see there."""

    storage: Storage

    @property
    def name(self) -> str:
        return self.storage.format

    def detect(self, tensors: list[str]) -> bool:
        return WEIGHT in tensors

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        storage, bits = self.storage, self.storage.bits
        expect(prefix, SHAPE, ((2,),), ('I64', 'I32'), self.name)
        out_features, in_features = prefix.get(SHAPE).tolist()
        if not (0 < out_features < MAX_SIZE and 0 < in_features < MAX_SIZE):
            raise unlike(prefix, self.name, f'weight_shape is [{out_features}, {in_features}]')
        layout = Layout(scheme_of(storage), out_features, in_features, storage.transform)
        expect(prefix, WEIGHT, ((out_features, words_for(in_features, bits)),), ('I32',), self.name)
        expect(prefix, SCALE, self._shapes(layout), FLOATS, self.name)
        if not storage.symmetric:
            expect(prefix, ZEROS, ((words_for(self._rows(layout), bits), layout.groups),), ('I32',), self.name)
        if prefix.has(ORDER):
            expect(prefix, ORDER, ((in_features,),), ('I32', 'I64'), self.name)
        if storage.static:
            expect(prefix, INPUT_SCALE, ((), (1,)), FLOATS, self.name)
        return check_transform(prefix, layout, self.name)

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        layout, storage, bits = self.describe(prefix, dtype), self.storage, self.storage.bits
        try:
            perm = order_of(prefix.get(ORDER), storage.group) if prefix.has(ORDER) else None
        except ValueError as error:
            raise unlike(prefix, self.name, str(error)) from None
        codes = ordered(unpack(prefix.get(WEIGHT).t(), bits, layout.in_features), perm)
        zeros = None
        if storage.symmetric:
            codes = centred(codes, bits)
        else:
            zeros = unpack(prefix.get(ZEROS), bits, self._rows(layout)).to(torch.int16).t()
            zeros = zeros.expand(layout.groups, layout.out_features).contiguous()
        scales = prefix.get(SCALE).reshape(-1, layout.groups).t()
        return LinearBundle(
            layout.scheme, layout.out_features, layout.in_features, codes=codes,
            scales=scales.expand(layout.groups, layout.out_features).contiguous(), zeros=zeros,
            bias=load_bias(prefix, layout.out_features, dtype), perm=perm,
            input_scale=prefix.get(INPUT_SCALE).reshape(()) if storage.static else None,
            input_transform=layout.transform,
        )  # fmt: skip

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        bits, codes, scales = self.storage.bits, bundle.stored, bundle.scales
        if scales is None:
            raise ValueError('pack-quantized holds grouped codes')
        if bundle.zeros is None:
            codes = uncentred(codes, bits)
        tensors = {
            WEIGHT: pack(unordered(codes, bundle.perm), bits).t().contiguous(),
            SCALE: self._stored(scales.t().contiguous()),
            SHAPE: torch.tensor([bundle.out_features, bundle.in_features]),
        }
        if bundle.zeros is not None:
            tensors[ZEROS] = pack(self._stored(bundle.zeros.t().contiguous()), bits)
        if bundle.perm is not None:
            tensors[ORDER] = groups_of(bundle.perm, bundle.in_features, bundle.scheme.group)
        if bundle.input_scale is not None:
            tensors[INPUT_SCALE] = bundle.input_scale.reshape(1)
        return with_bias(tensors, bundle)

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return dequantize_bundle(bundle, torch.float32)

    def _rows(self, layout: Layout) -> int:
        """Rows of scales and zero points."""
        return layout.out_features if self.storage.rows else 1

    def _shapes(self, layout: Layout) -> tuple[Shape, ...]:
        return ((layout.out_features, layout.groups),) if self.storage.rows else ((), (1,), (1, 1))

    def _stored(self, values: Tensor) -> Tensor:
        """``[out, groups]``, or ``[1, 1]`` where all outputs share it."""
        if self.storage.rows:
            return values
        if not bool((values == values[:1]).all()):
            raise ValueError('pack-quantized has one scale for the whole weight here')
        return values[:1].contiguous()


def compressed_scaled(storage: Storage) -> ScaledFormat:
    """int-quantized and float-quantized."""
    return ScaledFormat(storage, (SCALE,))
