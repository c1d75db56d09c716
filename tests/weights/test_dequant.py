"""Dequantisation is bit-equal to the gguf package's, whatever the blocks hold."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.weights.dequant import BLOCK_SIZES, BLOCK_TYPES, CHUNK_ELEMENTS, dequantize, dequantize_into

SPECIAL_HALVES = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00], np.uint16)
HALF_OFFSETS = {'Q4_0': [0], 'Q4_1': [0, 2], 'Q5_0': [0], 'Q5_1': [0, 2], 'Q8_0': [0], 'Q4_K': [0, 2], 'Q5_K': [0, 2],
                'Q6_K': [208]}  # fmt: skip


def reference(blocks: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all='ignore'):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


def assert_same_bits(found: torch.Tensor, wanted: np.ndarray) -> None:
    """Equal bit for bit; any NaN equals any other."""
    a, b = found.numpy(), wanted
    assert a.shape == b.shape
    assert np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b)))


@pytest.mark.parametrize('name', BLOCK_TYPES)
def test_any_bytes(name: str) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (64, 5 * BLOCK_SIZES[name][1]), dtype=np.uint8)
    assert_same_bits(dequantize(torch.from_numpy(blocks), name), reference(blocks, name))


@pytest.mark.parametrize('name', BLOCK_TYPES)
@pytest.mark.parametrize('fill', [0, 0x7F, 0x80, 0xFF])
def test_extreme_scales(name: str, fill: int) -> None:
    offsets = HALF_OFFSETS[name]
    pairs = [(a, b) for a in SPECIAL_HALVES for b in SPECIAL_HALVES]
    blocks = np.full((len(pairs), BLOCK_SIZES[name][1]), fill, np.uint8)
    for block, pair in zip(blocks, pairs):
        for offset, half in zip(offsets, pair):
            block[offset : offset + 2] = np.frombuffer(half.tobytes(), np.uint8)
    assert_same_bits(dequantize(torch.from_numpy(blocks), name), reference(blocks, name))


@given(name=st.sampled_from(sorted(BLOCK_TYPES)), data=st.data())
def test_one_block(name: str, data: st.DataObject) -> None:
    size = BLOCK_SIZES[name][1]
    block = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(1, size)
    assert_same_bits(dequantize(torch.from_numpy(block.copy()), name), reference(block, name))


@pytest.mark.parametrize('name', BLOCK_TYPES)
def test_chunks_do_not_show(name: str) -> None:
    elements, nbytes = BLOCK_SIZES[name]
    count = CHUNK_ELEMENTS // elements + 3
    blocks = np.random.default_rng(2).integers(0, 256, (count, nbytes), dtype=np.uint8)
    assert_same_bits(dequantize(torch.from_numpy(blocks), name), reference(blocks, name))


def test_rounds_from_float32_to_the_output_type() -> None:
    blocks = torch.from_numpy(np.random.default_rng(3).integers(0, 100, (32, 210), dtype=np.uint8))
    out = torch.empty(32, 256, dtype=torch.bfloat16)
    dequantize_into(blocks, 'Q6_K', out)
    assert torch.equal(out.view(torch.int16), dequantize(blocks, 'Q6_K').bfloat16().view(torch.int16))


def test_block_sizes_are_those_of_the_format() -> None:
    known = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {name: BLOCK_SIZES[name] for name in known} == known
