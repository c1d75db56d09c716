"""GGUF blocks as codes with scales: as they are where they have 4 bits, rounded again to 8 bits a channel elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.config.quantization import INT, Storage
from lmdeploy.ops.quantize import LARGEST
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import CHUNK, dequantize_bundle
from lmdeploy.quant.formats.base import scheme_of
from lmdeploy.quant.rounding import LEAST_SCALE
from lmdeploy.quant.rows import take_outputs
from lmdeploy.weights.checkpoint import MAX_THREADS
from lmdeploy.weights.dequant import BLOCK_TYPES, CHUNK_ELEMENTS, FOUR_BITS, nibbles

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
    """The nearest weight that is stored as ``storage`` says: symmetric codes of 8 bits, a scale for each output.

    Codes fit the scales as they are stored, in bfloat16. On a CPU threads take whole pieces of the weight, as when
    blocks are read (see :mod:`lmdeploy.weights.checkpoint`).
    """
    assert storage.bits == 8 and not storage.group and storage.symmetric
    device, plain = bundle.stored.device, replace(bundle, bias=None)
    kind = torch.int8 if storage.kind == 'int' else getattr(torch, storage.kind)
    limit = LARGEST['int8' if storage.kind == 'int' else storage.kind]
    codes = torch.empty(bundle.out_features, bundle.in_features, dtype=kind, device=device)
    scales = torch.empty(bundle.out_features, dtype=torch.bfloat16, device=device)
    step = max(1, (CHUNK_ELEMENTS if device.type == 'cpu' else CHUNK) // max(1, bundle.in_features))

    def round_piece(start: int) -> None:
        part = slice(start, min(start + step, bundle.out_features))
        index = torch.arange(part.start, part.stop, device=device)
        weight = dequantize_bundle(take_outputs(plain, index), torch.float32)
        scales[part] = weight.abs().amax(1).div_(limit).clamp_(min=LEAST_SCALE)
        weight.div_(scales[part].float().unsqueeze(1)).clamp_(-limit, limit)
        codes[part] = weight.round_() if storage.kind == 'int' else weight

    with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS)) as pool:
        for _ in pool.map(round_piece, range(0, bundle.out_features, step)):
            pass  # raises what a piece raised
    return LinearBundle(scheme_of(storage), bundle.out_features, bundle.in_features, codes=codes.t(),
                        scales=scales.unsqueeze(0), bias=bundle.bias,
                        input_transform=bundle.input_transform)  # fmt: skip


def alike(bundles: Sequence[LinearBundle]) -> list[LinearBundle]:
    """Bundles that can be joined: blocks of more than 4 bits, and those of different types, become 8-bit codes."""
    names = {bundle.scheme.name for bundle in bundles}
    if names <= BLOCK_TYPES.keys() and (len(names) > 1 or not names <= FOUR_BITS):
        return [by_channel(bundle) for bundle in bundles]
    return list(bundles)
