"""Linear: the one linear layer. How it is stored, multiplied and split are three separate choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.errors import LoadError
from lmdeploy.nn.build import Build
from lmdeploy.ops.quantize import CodesOf, TokenCodes
from lmdeploy.parallel.group import Group
from lmdeploy.parallel.split import Split
from lmdeploy.quant.blocks import alike
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels import KernelCase, LinearKernel, TakesCodes, choose_kernel
from lmdeploy.quant.rows import join
from lmdeploy.quant.shard import slice_inputs, slice_outputs
from lmdeploy.quant.transform import transformed, without_transform
from lmdeploy.weights.checkpoint import Prefix
from lmdeploy.weights.dequant import BLOCK_TYPES


class Linear:
    """``y = x @ W + b`` for ``x [T, in]``, made of one or several parts whose outputs lie side by side.

    Args:
        in_features: width of x.
        out_features: width of each part.
        bias: whether the checkpoint must hold a bias for every part; where it must not, one that is there is used.
        split: how the layer is divided over the ranks.
        shares: for every rank, the index of its outputs (of all parts together) or inputs, see
            :mod:`lmdeploy.quant.shard`; None: this rank has all of them.
    """

    def __init__(self, build: Build, in_features: int, out_features: Sequence[int], bias: bool = False,
                 split: Split = Split.NONE, shares: Sequence[Tensor] | None = None) -> None:  # fmt: skip
        self.build = build
        self.in_features, self.out_features = in_features, tuple(out_features)
        self.bias, self.split = bias, split
        self.shares = shares if build.group.size > 1 and split is not Split.NONE else None
        self._take: Tensor | None = None  # which of all ranks' inputs this one multiplies; None: its own
        self.kernel: LinearKernel | None = None
        self._packed: Any = None
        self.takes: CodesOf | None = None  # how inputs may be quantised before they come here
        self.added: Tensor | None = None  # the bias that kernel and packed weights hold: a view for those who ask
        self._rounds = False  # what :meth:`apply_float` gives was rounded on its way

    def check(self, *prefixes: Prefix) -> None:
        """Refuse from headers alone what :meth:`load` cannot read; one prefix may hold all parts.

        Raises:
            LoadError: as :func:`check_parts`.
        """
        widths = self.out_features if len(prefixes) > 1 else (sum(self.out_features),)
        check_parts(self.build, prefixes, self.in_features, widths)

    def load(self, *prefixes: Prefix) -> None:
        """Pull the parts, in their order, from the checkpoint.

        Raises:
            LoadError: a tensor is missing or has the wrong shape; LMD-141, the parts are quantised differently.
        """
        parts = [read_bundle(self.build, prefix, self.in_features, out, self.bias)
                 for prefix, out in zip(prefixes, self.out_features, strict=True)]  # fmt: skip
        try:
            joined = join(alike(parts))
        except ValueError as error:
            raise _mixed(prefixes, error) from None
        self.set(joined)

    def set(self, bundle: LinearBundle) -> None:
        """Take a bundle of the whole layer as this one's parameters; it is given to the kernel and not kept."""
        self.put(bundle if self.shares is None else self._slice(bundle, self.shares))

    def put(self, bundle: LinearBundle) -> None:
        """As :meth:`set`, a bundle that is this rank's part of the layer."""
        if self.build.policy.blocks:
            bundle = alike((bundle,))[0]
        case = KernelCase(bundle.scheme, self.build.dtype, self.build.device, bundle.out_features, bundle.in_features)
        self.kernel = choose_kernel(case)
        self.added = bundle.bias
        self._packed = self.kernel.pack(without_transform(bundle), case)
        self._apply = transformed(self.kernel.apply, bundle.input_transform)
        self._apply_float = transformed(self.kernel.apply_float, bundle.input_transform)
        self._rounds = self.kernel.rounds(case)
        whole = self.shares is None or self.split is Split.OUT
        if isinstance(self.kernel, TakesCodes) and whole and not bundle.input_transform:
            self.takes = self.kernel.takes(self._packed)

    def __call__(self, x: Tensor | TokenCodes) -> Tensor:
        """``[T, out]`` of ``x [T, in]``, which may be quantised as :attr:`takes` says."""
        if isinstance(x, TokenCodes):
            assert isinstance(self.kernel, TakesCodes)
            return self.kernel.apply_codes(x, self._packed, self.build.dtype)
        if self.shares is None or self.split is Split.OUT:
            return self._apply(x, self._packed)
        if self._take is not None:
            x = gather(self.build.group, x, self.shares).index_select(1, self._take)
        return self.build.group.all_reduce(self._apply(x, self._packed))

    def apply_float(self, x: Tensor) -> Tensor:
        """``[T, out] float32``, for a layer that is not split over its inputs."""
        assert self.kernel is not None and self.split is not Split.IN
        return self._apply_float(x, self._packed)

    def _slice(self, bundle: LinearBundle, shares: Sequence[Tensor]) -> LinearBundle:
        """This rank's part of the layer."""
        rank = self.build.group.rank
        if self.split is Split.OUT:
            return slice_outputs(bundle, shares[rank])
        part = slice_inputs(bundle, shares, rank)
        if part.take is not None:
            self._take = places(shares)[part.take].to(self.build.device)
        return part.bundle


def gather(group: Group, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """All ranks' ``x``, each filled up to the widest: ``[T, size * widest]``."""
    widest = max(map(len, shares))
    return group.all_gather(F.pad(x, (0, widest - x.shape[1])))


def places(shares: Sequence[Tensor]) -> Tensor:
    """``[features] int64``: where :func:`gather` puts each feature."""
    widest = max(map(len, shares))
    held = torch.cat([F.pad(share, (0, widest - len(share)), value=-1) for share in shares])
    where = torch.empty(int(held.max()) + 1, dtype=torch.int64)
    there = (held >= 0).nonzero()[:, 0]
    where[held[there]] = there
    return where


def read_bundle(build: Build, prefix: Prefix, in_features: int, out_features: int, bias: bool) -> LinearBundle:
    """One linear layer from a checkpoint, with its shape checked.

    Raises:
        LoadError: LMD-132 missing weight or bias, LMD-133 wrong shape.
    """
    bundle = build.policy.format(prefix).load(prefix, build.dtype)
    file = prefix.checkpoint.path
    found, wanted = [bundle.out_features, bundle.in_features], [out_features, in_features]
    if found != wanted:
        raise LoadError('LMD-133', tensor=f'{prefix.path}.weight', file=file, found=found, wanted=wanted)
    if bias and bundle.bias is None:
        raise LoadError('LMD-132', tensor=f'{prefix.path}.bias', file=file)
    return bundle


def check_parts(build: Build, prefixes: Sequence[Prefix], in_features: int, out_features: Sequence[int]) -> None:
    """Check the headers of parts that become one layer: their shapes, and that they are stored in one way.

    Raises:
        LoadError: LMD-132 missing, LMD-133 wrong shape, LMD-140 wrong type, LMD-141 parts that are stored differently,
            LMD-142 not what the configuration says.
    """
    first = None
    for prefix, width in zip(prefixes, out_features, strict=True):
        layout = build.policy.describe(prefix, build.dtype)
        found, wanted = [layout.out_features, layout.in_features], [width, in_features]
        if found != wanted:
            raise LoadError('LMD-133', tensor=f'{prefix.path}.weight', file=prefix.checkpoint.path, found=found,
                            wanted=wanted)  # fmt: skip
        first = first or layout
        schemes = {layout.scheme, first.scheme}
        if len(schemes) > 1 and not {scheme.name for scheme in schemes} <= BLOCK_TYPES.keys():
            raise _mixed(prefixes, f'stored as {first.scheme} beside {layout.scheme}')
        if layout.transform != first.transform:
            raise _mixed(prefixes, f'inputs transformed by {first.transform!r} beside {layout.transform!r}')


def _mixed(prefixes: Sequence[Prefix], reason: object) -> LoadError:
    layers = ', '.join(prefix.path for prefix in prefixes)
    return LoadError('LMD-141', layers=layers, file=prefixes[0].checkpoint.path, reason=reason)
