"""Codes in words: every width, whatever the codes, against integers that are as long as they need to be."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.quant.packing import pack, unpack, words_for
from tests.quant.formats.packers import columns


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.integers(2, 8))
    count, n = draw(st.integers(1, 70)), draw(st.integers(1, 3))
    code = st.integers(0, (1 << bits) - 1)
    return bits, torch.tensor([[draw(code) for _ in range(n)] for _ in range(count)], dtype=torch.uint8)


@given(matrices())
@settings(max_examples=80, deadline=None)
def test_pack_is_the_definition_and_unpack_its_inverse(drawn):
    bits, codes = drawn
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (words_for(len(codes), bits), codes.shape[1])
    assert torch.equal(words, columns(codes, bits))
    assert torch.equal(unpack(words, bits, len(codes)), codes)


def test_strided_words():
    codes = torch.randint(0, 8, (5, 64), dtype=torch.uint8)
    words = pack(codes.t(), 3).t().contiguous()  # [5, 6]: a stream along every row
    assert torch.equal(unpack(words.t(), 3, 64).t(), codes)
