"""The face of a checkpoint format: how the parameters of one linear layer are stored; and what formats share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage, hadamard_block
from lmdeploy.errors import LoadError
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.scheme import QuantScheme
from lmdeploy.weights.checkpoint import Prefix

FLOATS = ('F16', 'BF16', 'F32')
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What headers and the configuration tell of a layer."""

    scheme: QuantScheme
    out_features: int
    in_features: int
    transform: str = ''

    @property
    def groups(self) -> int:
        """Rows of scales."""
        return -(-self.in_features // self.scheme.group) if self.scheme.group else 1


def scheme_of(storage: Storage) -> QuantScheme:
    """What the numbers of a layer are that is stored so."""
    return QuantScheme(storage.kind, storage.bits, storage.group, storage.symmetric, storage.activation,
                       storage.activation_group, storage.static)  # fmt: skip


class WeightFormat(Protocol):
    """One storage format. ``load(save(b))`` gives ``b`` again."""

    @property
    def name(self) -> str: ...

    def detect(self, tensors: list[str]) -> bool:
        """Whether a layer with these tensor names (``['weight', 'bias']``, ...) can be of this format."""

    def describe(self, prefix: Prefix, dtype: torch.dtype) -> Layout:
        """What :meth:`load` would give, from headers; shapes and types of all tensors are checked.

        Raises:
            LoadError: LMD-132 a tensor is missing, LMD-133 of another shape, LMD-140 of another type, LMD-142 not what
                the configuration says.
        """

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        """The layer below ``prefix``; a dense weight and the bias come in ``dtype``, all else as it is stored.

        Raises:
            LoadError: as :meth:`describe`.
        """

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        """The tensors to store, by their names below the layer's prefix.

        Raises:
            ValueError: the format cannot hold the bundle.
        """

    def dequant(self, bundle: LinearBundle) -> Tensor:
        """The weight ``[out, in]`` that the layer multiplies with: float32 for what is quantised."""


def expect(prefix: Prefix, name: str, shapes: tuple[Shape, ...], types: tuple[str, ...], form: str) -> None:
    """Check a tensor's header: one of ``shapes``, one of ``types`` (``'F16'``, ...).

    Raises:
        LoadError: LMD-132, LMD-133, LMD-140.
    """
    found, kind = prefix.shape(name), prefix.dtype_name(name)
    tensor, file = f'{prefix.path}.{name}', prefix.checkpoint.path
    if found not in shapes:
        wanted = ' or '.join(str(list(shape)) for shape in shapes)
        raise LoadError('LMD-133', tensor=tensor, file=file, found=list(found), wanted=wanted)
    if kind not in types:
        raise LoadError('LMD-140', tensor=tensor, file=file, found=kind, format=form, wanted=', '.join(types))


def matrix_shape(prefix: Prefix, name: str) -> tuple[int, int]:
    """Both sizes of a tensor.

    Raises:
        LoadError: LMD-132 there is none; LMD-133 it has another number of dimensions.
    """
    found = prefix.shape(name)
    if len(found) != 2:
        raise LoadError('LMD-133', tensor=f'{prefix.path}.{name}', file=prefix.checkpoint.path, found=list(found),
                        wanted='[any, any]')  # fmt: skip
    return found[0], found[1]


def check_transform(prefix: Prefix, layout: Layout, form: str) -> Layout:
    """``layout``, whose inputs have to be whole blocks of its transform.

    Raises:
        LoadError: LMD-142: they are not.
    """
    if layout.transform and layout.in_features % (block := hadamard_block(layout.transform)):
        raise unlike(prefix, form, f'blocks of {block} do not divide its {layout.in_features} inputs')
    return layout


def unlike(prefix: Prefix, form: str, reason: str) -> LoadError:
    """LMD-142: the layer's tensors are not what the configuration says."""
    return LoadError('LMD-142', layer=prefix.path, file=prefix.checkpoint.path, format=form, reason=reason)


def load_bias(prefix: Prefix, out_features: int, dtype: torch.dtype) -> Tensor | None:
    return prefix.get('bias', (out_features,), dtype) if prefix.has('bias') else None


def with_bias(tensors: dict[str, Tensor], bundle: LinearBundle) -> dict[str, Tensor]:
    """``tensors`` and the bundle's bias, if it has one."""
    return tensors if bundle.bias is None else tensors | {'bias': bundle.bias}


def centred(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 (uint8, changed) as codes around zero, ``int8``: less ``2**(bits - 1)``."""
    return codes.sub_(1 << bits - 1).view(torch.int8)  # uint8 wraps as int8 does


def uncentred(codes: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`centred`: uint8 codes from 0."""
    return codes.view(torch.uint8) + (1 << bits - 1)
