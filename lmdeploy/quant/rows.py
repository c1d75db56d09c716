"""Joining and reordering the output features of bundles: what fused layers are made of at load time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.scheme import dense_scheme


def join(bundles: Sequence[LinearBundle]) -> LinearBundle:
    """One layer whose outputs are those of ``bundles``, one after the other. A missing bias beside others is zero.

    Layers that sort their inputs differently have no common codes: if inputs are not quantised, they are joined dense.

    Raises:
        ValueError: they differ in scheme, in inputs or in what is done to them.
    """
    first = bundles[0]
    if len(bundles) == 1:
        return first
    for other in bundles[1:]:
        same = (other.scheme, other.in_features, other.input_transform) == (
            first.scheme, first.in_features, first.input_transform)  # fmt: skip
        if not same or not _equal(first.input_scale, other.input_scale):
            raise ValueError(f'layers of {first.scheme} and {other.scheme} cannot be joined')
    if any(not _equal(first.perm, other.perm) for other in bundles[1:]):
        if first.scheme.activation or first.input_transform:
            raise ValueError(f'layers of {first.scheme} that sort their inputs differently cannot be joined')
        return join([_dense(bundle) for bundle in bundles])
    return replace(
        first,
        out_features=sum(b.out_features for b in bundles),
        weight=_cat([b.weight for b in bundles], 0),
        codes=_cat([b.codes for b in bundles], _rows_dim(first)),
        scales=_cat([b.scales for b in bundles], 1),
        zeros=_cat([b.zeros for b in bundles], 1),
        bias=_biases(bundles),
    )


def take_outputs(bundle: LinearBundle, index: Tensor) -> LinearBundle:
    """The layer of the output features ``index [n] int64``, in that order."""
    index = index.to(bundle.stored.device)

    def pick(tensor: Tensor | None, dim: int) -> Tensor | None:
        return None if tensor is None else tensor.index_select(dim, index)

    return replace(
        bundle,
        out_features=len(index),
        weight=pick(bundle.weight, 0),
        codes=pick(bundle.codes, _rows_dim(bundle)),
        scales=pick(bundle.scales, 1),
        zeros=pick(bundle.zeros, 1),
        bias=pick(bundle.bias, 0),
    )


def _dense(bundle: LinearBundle) -> LinearBundle:
    weight = dequantize_bundle(bundle, torch.float32)
    return LinearBundle(dense_scheme(32), bundle.out_features, bundle.in_features, weight=weight, bias=bundle.bias)


def _rows_dim(bundle: LinearBundle) -> int:
    """The dimension of ``codes`` along which output features run: 1, but 0 for blocks, which are rows of outputs."""
    return 0 if bundle.codes is not None and bundle.scales is None else 1


def _cat(tensors: list[Tensor | None], dim: int) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present, dim) if present else None


def _biases(bundles: Sequence[LinearBundle]) -> Tensor | None:
    given = next((b.bias for b in bundles if b.bias is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_zeros(b.out_features) if b.bias is None else b.bias for b in bundles])


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
