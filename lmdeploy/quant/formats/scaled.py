"""One code per element, ``weight [out, in]`` in int8 or float8, and a tensor of scales: what three formats share.

They differ in the name of the scales, which multiply. Scales are one for the tensor, one per output channel, per group
of input channels, or per block of both.
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
    matrix_shape,
    scheme_of,
    uncentred,
    unlike,
    with_bias,
)
from lmdeploy.weights.checkpoint import Prefix

TYPES = {'int': 'I8', 'float8_e4m3fn': 'F8_E4M3', 'float8_e5m2': 'F8_E5M2'}
ZEROS, INPUT_SCALE, INPUT_ZERO = 'weight_zero_point', 'input_scale', 'input_zero_point'


@dataclass(frozen=True, slots=True)
class ScaledFormat:
    """See the module.

    Args:
        scale_names: names of the scales; the first that is there is read, and the first of all is written.
    """

    storage: Storage
    scale_names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.storage.format

    def detect(self, tensors: list[str]) -> bool:
        return 'weight' in tensors and any(name in tensors for name in self.scale_names)

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        storage = self.storage
        out_features, in_features = matrix_shape(prefix, 'weight')
        layout = Layout(scheme_of(storage), out_features, in_features, storage.transform)
        expect(prefix, 'weight', ((out_features, in_features),), (TYPES[storage.kind],), self.name)
        shapes = self._shapes(layout)
        expect(prefix, self._scale(prefix), shapes, FLOATS, self.name)
        if prefix.has(ZEROS) or not storage.symmetric:
            expect(prefix, ZEROS, shapes, ('I8', *FLOATS, 'F8_E4M3'), self.name)
        if storage.static:
            expect(prefix, INPUT_SCALE, ((), (1,)), FLOATS, self.name)
        return check_transform(prefix, layout, self.name)

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        layout, storage = self.describe(prefix, dtype), self.storage
        codes = prefix.get('weight').t()
        zeros = self._canonical(prefix.get(ZEROS), layout) if prefix.has(ZEROS) else None
        if zeros is not None and storage.symmetric:
            self._check_none(prefix, ZEROS, zeros)
            zeros = None
        if zeros is not None:  # around zero, as the codes are
            middle = 1 << storage.bits - 1
            codes, zeros = uncentred(codes, storage.bits), zeros.to(torch.int16) + middle
        if storage.static and prefix.has(INPUT_ZERO):
            self._check_none(prefix, INPUT_ZERO, prefix.get(INPUT_ZERO))
        return LinearBundle(
            layout.scheme, layout.out_features, layout.in_features, codes=codes,
            scales=self._canonical(prefix.get(self._scale(prefix)), layout), zeros=zeros,
            bias=load_bias(prefix, layout.out_features, dtype),
            input_scale=prefix.get(INPUT_SCALE).reshape(()) if storage.static else None,
            input_transform=layout.transform,
        )  # fmt: skip

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        codes, zeros = bundle.stored, bundle.zeros
        if bundle.scales is None or bundle.perm is not None:
            raise ValueError(f'{self.name} holds scaled codes in their own order')
        tensors = {self.scale_names[0]: self._stored(bundle.scales, bundle)}
        if zeros is not None:
            middle = 1 << self.storage.bits - 1
            codes = centred(codes.clone(), self.storage.bits)
            tensors[ZEROS] = self._stored((zeros - middle).to(torch.int8), bundle)
        if bundle.input_scale is not None:
            tensors[INPUT_SCALE] = bundle.input_scale.reshape(1)
        return with_bias(tensors | {'weight': codes.t().contiguous()}, bundle)

    def dequant(self, bundle: LinearBundle) -> Tensor:
        return dequantize_bundle(bundle, torch.float32)

    def _scale(self, prefix: Prefix) -> str:
        return next((name for name in self.scale_names if prefix.has(name)), self.scale_names[0])

    def _shapes(self, layout: Layout) -> tuple[Shape, ...]:
        """The shapes that scales may have."""
        rows, n = self.storage.rows, layout.out_features
        if rows > 1:
            return ((-(-n // rows), layout.groups),)
        if rows == 1:
            return ((n, layout.groups), *(((n,),) if layout.groups == 1 else ()))
        per_channel = ((n,), (n, 1)) if self.name == 'fp8' else ()  # whose configuration does not tell them apart
        return ((), (1,), (1, 1), *per_channel)

    def _canonical(self, values: Tensor, layout: Layout) -> Tensor:
        """Scales or zero points as stored to ``[groups, out]``."""
        if values.numel() == 1:
            return values.reshape(1, 1).expand(layout.groups, layout.out_features).contiguous()
        values = values.reshape(-1, layout.groups)
        if self.storage.rows > 1:
            values = values.repeat_interleave(self.storage.rows, 0)[: layout.out_features]
        return values.t().contiguous()

    def _stored(self, values: Tensor, bundle: LinearBundle) -> Tensor:
        """The inverse of :meth:`_canonical`."""
        rows = self.storage.rows
        if rows == 0:
            first = values.flatten()[:1]
            if bool((values == first).all()):
                return first.clone()
            if self.name != 'fp8':
                raise ValueError(f'{self.name} has one scale for the whole weight here')
            return values.t().contiguous()
        stored = values.t()[::rows].contiguous()
        if not torch.equal(stored.repeat_interleave(rows, 0)[: bundle.out_features], values.t()):
            raise ValueError(f'{self.name} has one scale for blocks of {rows} outputs')
        return stored

    def _check_none(self, prefix: Prefix, name: str, zeros: Tensor) -> None:
        if bool((zeros.to(torch.float32) != 0).any()):
            raise unlike(prefix, self.name, f'it is symmetric, but {name} is not zero')
