"""AutoAWQ's ``gemm`` layout: 4-bit codes, eight of neighbouring outputs in a word, in an order of their own.

``qweight [in, out/8] int32``, ``qzeros [groups, out/8] int32``, ``scales [groups, out]``, and an optional ``bias
[out]``. Bits 4i to 4i+3 of word c belong to output ``8 c + ORDER[i]``, in weights and zero points alike.
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
from lmdeploy.quant.packing import pack, unpack
from lmdeploy.weights.checkpoint import Prefix

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble of a word -> output
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # output -> nibble
MIDDLE = 8


@dataclass(frozen=True, slots=True)
class AWQFormat:
    """See the module; without zero points, the stored ones must all be MIDDLE."""

    storage: Storage

    @property
    def name(self) -> str:
        return self.storage.format

    def detect(self, tensors: list[str]) -> bool:
        return {'qweight', 'qzeros', 'scales'} <= set(tensors)

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        in_features, words = matrix_shape(prefix, 'qweight')
        layout = Layout(scheme_of(self.storage), 8 * words, in_features)
        expect(prefix, 'qweight', ((in_features, words),), ('I32',), self.name)
        expect(prefix, 'qzeros', ((layout.groups, words),), ('I32',), self.name)
        expect(prefix, 'scales', ((layout.groups, 8 * words),), FLOATS, self.name)
        return layout

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        layout = self.describe(prefix, dtype)
        codes, zeros = _unpack(prefix.get('qweight')), _unpack(prefix.get('qzeros'))
        if layout.scheme.symmetric and (zeros != MIDDLE).any():
            raise unlike(prefix, self.name, f'zero_point is false, but there are zero points other than {MIDDLE}')
        return LinearBundle(
            layout.scheme, layout.out_features, layout.in_features,
            codes=centred(codes, 4) if layout.scheme.symmetric else codes, scales=prefix.get('scales'),
            zeros=None if layout.scheme.symmetric else zeros.to(torch.int16),
            bias=load_bias(prefix, layout.out_features, dtype),
        )  # fmt: skip

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        codes, zeros, scales = bundle.stored, bundle.zeros, bundle.scales
        if scales is None or bundle.perm is not None or bundle.out_features % 8:
            raise ValueError('AWQ holds grouped codes in their own order, of a multiple of 8 outputs')
        if zeros is None:
            codes = uncentred(codes, 4)
            zeros = torch.full(scales.shape, MIDDLE, dtype=torch.int16, device=scales.device)
        return with_bias({'qweight': _pack(codes), 'qzeros': _pack(zeros), 'scales': scales}, bundle)

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return dequantize_bundle(bundle, torch.float32)


def _unpack(words: Tensor) -> Tensor:
    """``[n, out/8] int32`` to ``[n, out] uint8``."""
    codes = unpack(words.t(), 4, 8 * words.shape[1]).unflatten(0, (-1, 8))
    return codes[:, list(PLACES)].flatten(0, 1).t()


def _pack(codes: Tensor) -> Tensor:
    """``[n, out]`` to ``[n, out/8] int32``."""
    ordered = codes.t().unflatten(0, (-1, 8))[:, list(ORDER)].flatten(0, 1)
    return pack(ordered, 4).t().contiguous()
