"""GGUF blocks as codes with scales: as they are where they have 4 bits, rounded again to 8 bits a channel elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.config.quantization import INT, Storage
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import CHUNK, dequantize_bundle
from lmdeploy.quant.formats.base import scheme_of
from lmdeploy.quant.rounding import round_weight
from lmdeploy.quant.rows import take_outputs
from lmdeploy.weights.dequant import BLOCK_TYPES, FOUR_BITS, nibbles

CHANNELWISE = Storage(INT, 'int', 8)  # one scale for each output


@dataclass(frozen=True, slots=True)
class Nibbles:
    """``W[n, k] = codes[n, k] * scales[g, n] - minima[g, n]``, g the group of 32 channels of k.

    ``codes [out, in] uint8`` from 0 to 15, ``scales`` and ``minima [groups, out] float32``.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor


def four_bits(bundle: LinearBundle) -> Nibbles:
    """The codes of a bundle of blocks whose type is one of ``FOUR_BITS``; nothing is rounded."""
    codes = torch.empty(bundle.out_features, bundle.in_features, dtype=torch.uint8)
    scales, minima = (torch.empty(bundle.out_features, bundle.in_features // 32) for _ in range(2))
    step = max(1, CHUNK // max(1, bundle.in_features))
    for start in range(0, bundle.out_features, step):
        part = slice(start, start + step)
        for whole, piece in zip((codes, scales, minima), nibbles(bundle.stored[part], bundle.scheme.name)):
            whole[part] = piece
    return Nibbles(codes, scales.t(), minima.t())


def by_channel(bundle: LinearBundle) -> LinearBundle:
    """The nearest weight of 8-bit codes with one scale for each output.

    An element is off by half a step at most: by 1/254 of the largest weight of its output.
    """
    return rounded(bundle, CHANNELWISE)


def rounded(bundle: LinearBundle, storage: Storage) -> LinearBundle:
    """The nearest weight that is stored as ``storage`` says, of 8-bit codes with scales in bfloat16 for each output."""
    assert storage.bits == 8 and not storage.group
    kind = torch.int8 if storage.kind == 'int' else getattr(torch, storage.kind)
    device = bundle.stored.device
    codes = torch.empty(bundle.out_features, bundle.in_features, dtype=kind, device=device)
    scales = torch.empty(1, bundle.out_features, dtype=torch.bfloat16, device=device)
    plain = replace(bundle, bias=None)
    step = max(1, CHUNK // max(1, bundle.in_features))
    for start in range(0, bundle.out_features, step):
        index = torch.arange(start, min(start + step, bundle.out_features), device=device)
        weight = dequantize_bundle(take_outputs(plain, index), torch.float32)
        part = round_weight(weight, storage, scales.dtype)
        assert part.codes is not None and part.scales is not None
        codes[start : start + step], scales[:, start : start + step] = part.codes.t(), part.scales
    return LinearBundle(scheme_of(storage), bundle.out_features, bundle.in_features, codes=codes.t(),
                        scales=scales, bias=bundle.bias, input_transform=bundle.input_transform)  # fmt: skip


def alike(bundles: Sequence[LinearBundle]) -> list[LinearBundle]:
    """Bundles that can be joined: blocks of more than 4 bits, and those of different types, become 8-bit codes."""
    names = {bundle.scheme.name for bundle in bundles}
    if names <= BLOCK_TYPES.keys() and (len(names) > 1 or not names <= FOUR_BITS):
        return [by_channel(bundle) for bundle in bundles]
    return list(bundles)
