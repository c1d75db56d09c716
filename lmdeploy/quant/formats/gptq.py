"""GPTQ: codes of 2, 3, 4 or 8 bits as a stream along the input channels.

``qweight [in * bits / 32, out] int32``, ``qzeros [groups, out * bits / 32] int32`` (a stream along the outputs),
``scales [groups, out]``, ``g_idx [in] int32`` (the group of each input channel), and an optional ``bias [out]``.
Version 1 stores zero points less 1, version 2 as they are.
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
    centred,
    expect,
    load_bias,
    matrix_shape,
    scheme_of,
    uncentred,
    unlike,
    with_bias,
)
from lmdeploy.quant.order import groups_of, order_of, ordered, unordered
from lmdeploy.quant.packing import pack, unpack, words_for
from lmdeploy.weights.checkpoint import Prefix


@dataclass(frozen=True, slots=True)
class GPTQFormat:
    """See the module. Channels that lie in an order of their own (act-order) are sorted by group when they load."""

    storage: Storage

    @property
    def name(self) -> str:
        return self.storage.format

    def detect(self, tensors: list[str]) -> bool:
        return {'qweight', 'qzeros', 'scales'} <= set(tensors)

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        bits = self.storage.bits
        words, out_features = matrix_shape(prefix, 'qweight')
        in_features = words * 32 // bits
        if words_for(in_features, bits) != words or in_features * bits % 32:
            raise unlike(prefix, self.name, f'{words} words of 32 bits do not hold codes of {bits} bits')
        layout = Layout(scheme_of(self.storage), out_features, in_features)
        expect(prefix, 'qweight', ((words, out_features),), ('I32',), self.name)
        expect(prefix, 'qzeros', ((layout.groups, words_for(out_features, bits)),), ('I32',), self.name)
        expect(prefix, 'scales', ((layout.groups, out_features),), FLOATS, self.name)
        if prefix.has('g_idx'):
            expect(prefix, 'g_idx', ((in_features,),), ('I32', 'I64'), self.name)
        return layout

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        layout, bits = self.describe(prefix, dtype), self.storage.bits
        symmetric, middle = layout.scheme.symmetric, 1 << bits - 1
        try:
            perm = order_of(prefix.get('g_idx'), self.storage.group) if prefix.has('g_idx') else None
        except ValueError as error:
            raise unlike(prefix, self.name, str(error)) from None
        codes = ordered(unpack(prefix.get('qweight'), bits, layout.in_features), perm)
        zeros = unpack(prefix.get('qzeros').t(), bits, layout.out_features).t().to(torch.int16)
        zeros += self.storage.zero_shift
        if symmetric and (zeros != middle).any():
            found = sorted(set(zeros.unique().tolist()) - {middle})[0]
            raise unlike(prefix, self.name, f'sym is true, but there is the zero point {found} instead of {middle}')
        return LinearBundle(
            layout.scheme, layout.out_features, layout.in_features,
            codes=centred(codes, bits) if symmetric else codes, scales=prefix.get('scales'),
            zeros=None if symmetric else zeros, bias=load_bias(prefix, layout.out_features, dtype), perm=perm,
        )  # fmt: skip

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        bits, codes, zeros, scales = self.storage.bits, bundle.stored, bundle.zeros, bundle.scales
        if scales is None or bundle.in_features * bits % 32:
            raise ValueError(f'GPTQ holds grouped codes, of a multiple of {32 // bits} inputs')
        if zeros is None:
            codes = uncentred(codes, bits)
            zeros = torch.full(scales.shape, 1 << bits - 1, dtype=torch.int16, device=scales.device)
        zeros = zeros - self.storage.zero_shift
        if bool((zeros < 0).any()) or bool((zeros >= 1 << bits).any()):
            raise ValueError('version 1 of GPTQ cannot hold a zero point of 0: choose 1, or version 2')
        tensors = {
            'qweight': pack(unordered(codes, bundle.perm), bits),
            'qzeros': pack(zeros.t(), bits).t().contiguous(),
            'scales': scales,
            'g_idx': groups_of(bundle.perm, bundle.in_features, bundle.scheme.group),
        }
        return with_bias(tensors, bundle)

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return dequantize_bundle(bundle, torch.float32)
