"""LinearBundle: one linear layer's parameters in canonical form, between a checkpoint format and a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmdeploy.quant.scheme import QuantScheme


@dataclass(slots=True)
class LinearBundle:
    """The parameters of ``y = x @ W + bias`` with ``W [in, out]``; exactly one of ``weight`` and ``codes`` is set.

    Quantised weights are canonical in the orientation of the maths, so that input channels run along dimension 0:
    ``W = (codes - zeros) * scales`` with every group of ``scheme.group`` input channels sharing a row of ``zeros`` and
    ``scales``; the last group may be smaller. Whatever shares scales among outputs in a file has them repeated here, so
    that outputs can be joined and reordered. Two storages keep the checkpoint's own row order instead, because a copy
    of the whole model would buy nothing: a dense ``weight`` is ``[out, in]`` (``W = weight.T``), and GGUF blocks are
    rows of outputs.

    Attributes:
        weight: dense weight ``[out, in]``, floating point.
        codes: ``[in, out]``, one code per element, in any memory order: int8 around zero where symmetric, uint8 where
            not, or float8. For a GGUF block type ``[out, row_bytes] uint8``, each row the blocks of one output.
        scales: ``[groups, out]``, in the type in which they are stored; None where dense or where the blocks hold them.
        zeros: ``[groups, out] int16`` zero points in units of codes; None where symmetric.
        bias: ``[out]``.
        perm: ``[in] int64``: the layer multiplies ``x[..., perm]`` (a format that sorts its input channels).
        input_scale: ``[]``: the one scale of all inputs, where ``scheme.static``.
        input_transform: name of a transform applied to x before the product (such as a block Hadamard), or ``''``.
    """

    scheme: QuantScheme
    out_features: int
    in_features: int
    weight: Tensor | None = None
    codes: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None
    perm: Tensor | None = None
    input_scale: Tensor | None = None
    input_transform: str = ''

    @property
    def stored(self) -> Tensor:
        """The tensor that is set: ``weight`` or ``codes``."""
        tensor = self.codes if self.weight is None else self.weight
        assert tensor is not None
        return tensor
