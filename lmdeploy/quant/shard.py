"""A rank's slice of a linear layer: once, on the canonical bundle, so that there is one rule for all formats.

A slice is named by an index over the whole layer's features; -1 in it stands for a feature of zeros, see
:mod:`lmdeploy.parallel.heads`. All slices are exact. Those of inputs cut through the groups that share a scale where
they must: the groups become smaller, and their scales are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.quantization import hadamard_block
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.rows import take_outputs
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.quant.transform import plain_weight
from lmdeploy.weights.dequant import BLOCK_SIZES, BLOCK_TYPES

LEAST_GROUP = 8  # channels: smaller groups take as much memory for scales as for codes


@dataclass(frozen=True, slots=True)
class InputSlice:
    """A rank's part of the inputs.

    Attributes:
        bundle: its ``in_features`` are those of the slice.
        take: ``[n] int64``: the rank multiplies these features of *all* inputs; None: its own.
    """

    bundle: LinearBundle
    take: Tensor | None = None


def slice_outputs(bundle: LinearBundle, index: Tensor) -> LinearBundle:
    """The layer of the outputs ``index [n] int64``, with outputs of zeros where it is -1."""
    padded = (index < 0).nonzero()[:, 0].to(bundle.stored.device)
    taken = take_outputs(bundle, index.clamp(min=0))
    if not len(padded):
        return taken
    blocks = taken.codes if taken.scales is None else None  # whose scale of zero is bytes of zero
    for tensor, dim in ((taken.weight, 0), (blocks, 0), (taken.scales, 1), (taken.bias, 0)):
        if tensor is not None:
            tensor.index_fill_(dim, padded, 0)
    return taken


def slice_inputs(bundle: LinearBundle, shares: Sequence[Tensor], rank: int) -> InputSlice:
    """Rank ``rank``'s summand of a layer whose inputs are shared out as ``shares``, one index for each rank.

    The bias goes with the first rank. Where the layer sorts its inputs, the sorted ones are shared out instead: ranks
    keep whole groups, and each takes its inputs from those of all ranks. A transform of the inputs stays where ranks
    have whole blocks of it; elsewhere the layer is made a dense one for plain inputs.

    Raises:
        ValueError: that would be a layer whose inputs are rounded behind the transform.
    """
    if bundle.input_transform and (bundle.perm is not None or not _in_blocks(shares, bundle.input_transform)):
        if bundle.scheme.activation:
            raise ValueError(f'inputs of {bundle.scheme} behind {bundle.input_transform} cannot be shared out so')
        bundle = LinearBundle(dense_scheme(32), bundle.out_features, bundle.in_features, weight=plain_weight(bundle),
                              bias=bundle.bias)  # fmt: skip
    plain = bundle if rank == 0 else replace(bundle, bias=None)
    if bundle.perm is not None:
        widths = [int((one >= 0).sum()) for one in shares]
        begin = sum(widths[:rank])
        index = torch.arange(begin, begin + widths[rank])
        index = index.to(bundle.stored.device)
        return InputSlice(_codes(replace(plain, perm=None), index), bundle.perm[index].cpu())
    index = shares[rank].to(bundle.stored.device)
    if bundle.weight is not None:
        weight = bundle.weight.index_select(1, index.clamp(min=0)).masked_fill_(index < 0, 0)
        return InputSlice(replace(plain, in_features=len(index), weight=weight))
    if bundle.scheme.name in BLOCK_TYPES:
        return InputSlice(_blocks(plain, index))
    return InputSlice(_codes(plain, index))


def _in_blocks(shares: Sequence[Tensor], transform: str) -> bool:
    """Whether every share is of whole blocks of the transform, each in its order."""
    block = hadamard_block(transform)
    for index in shares:
        if len(index) % block:
            return False
        runs = index.view(-1, block)
        if not torch.equal(runs, runs[:, :1] + torch.arange(block, device=index.device)) or (runs[:, 0] % block).any():
            return False
    return True


def common_group(index: Tensor, group: int) -> int:
    """The largest divisor of ``group`` such that every aligned run of so many channels of ``index`` is of one group.

    Channels of zeros (-1) belong to any. There are whole runs, as kernels like them.
    """
    owner = _owner(index, group)
    for size in (group // divisor for divisor in range(1, group + 1) if group % divisor == 0):
        if len(index) % size:
            continue
        runs = _runs(owner, size)
        least = runs.masked_fill(runs < 0, torch.iinfo(torch.int64).max).amin(1)
        if (runs.amax(1) <= least).all():
            return size
    return 1


def _owner(index: Tensor, group: int) -> Tensor:
    """The group of each channel; -1 for those of zeros."""
    return torch.where(index < 0, -1, index.div(group, rounding_mode='floor'))


def _runs(values: Tensor, size: int) -> Tensor:
    """``[n]`` as ``[ceil(n / size), size]``, filled up with -1."""
    return F.pad(values, (0, -len(values) % size), value=-1).view(-1, size)


def _codes(bundle: LinearBundle, index: Tensor) -> LinearBundle:
    """The inputs ``index`` of codes with scales; dense where groups would be too small."""
    assert bundle.codes is not None and bundle.scales is not None
    scheme, padded = bundle.scheme, index < 0
    group = common_group(index, scheme.group) if scheme.group else 0
    if scheme.group and group < min(LEAST_GROUP, scheme.group) and not scheme.activation:
        return _dense(bundle, index)
    codes, zeros = bundle.codes, bundle.zeros
    if codes.dtype.is_floating_point:  # bytes can be taken everywhere
        codes = codes.view(torch.uint8)
    codes = codes.index_select(0, index.clamp(min=0))
    if not group:
        scales, owner = bundle.scales, torch.zeros_like(index)
    else:
        owner = _runs(_owner(index, scheme.group), group).amax(1).clamp(min=0)
        scales = bundle.scales.index_select(0, owner)
        zeros = None if zeros is None else zeros.index_select(0, owner)
        owner = torch.arange(len(owner), device=index.device).repeat_interleave(group)[: len(index)]
    if padded.any():
        codes[padded] = 0 if zeros is None else zeros[owner[padded]].to(codes.dtype)
    inputs = scheme.activation_group
    scheme = replace(scheme, group=group, activation_group=min(inputs, group) if inputs else 0)
    return replace(bundle, scheme=scheme, in_features=len(index), codes=codes.view(bundle.codes.dtype),
                   scales=scales, zeros=zeros)  # fmt: skip


def _blocks(bundle: LinearBundle, index: Tensor) -> LinearBundle:
    """The inputs ``index`` of rows of blocks: whole blocks as they are, anything else dense."""
    elements, nbytes = BLOCK_SIZES[bundle.scheme.name]
    if len(index) % elements:
        return _dense(bundle, index)
    runs = index.view(-1, elements)
    if (runs[:, 0] % elements).any() or (runs != runs[:, :1] + torch.arange(elements, device=index.device)).any():
        return _dense(bundle, index)
    rows = bundle.stored.view(bundle.out_features, -1, nbytes).index_select(1, runs[:, 0] // elements)
    return replace(bundle, in_features=len(index), codes=rows.flatten(1))


def _dense(bundle: LinearBundle, index: Tensor) -> LinearBundle:
    weight = dequantize_bundle(replace(bundle, bias=None), torch.float32)
    weight = weight.index_select(1, index.clamp(min=0)).masked_fill_(index < 0, 0)
    return LinearBundle(dense_scheme(32), bundle.out_features, len(index), weight=weight, bias=bundle.bias,
                        input_transform=bundle.input_transform)  # fmt: skip
