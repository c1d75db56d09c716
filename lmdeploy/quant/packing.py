"""Integer codes in 32-bit words: one little-endian stream of bits per column, as GPTQ and compressed-tensors use.

Code k of a column lies at bits ``k * bits`` of the stream whose word i holds bits ``32 i`` to ``32 i + 31``; where bits
does not divide 32, a code may lie in two words. Codes and words run along dimension 0.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def words_for(count: int, bits: int) -> int:
    """How many words ``count`` codes take."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """``[words_for(count, bits), n] int32`` to codes ``[count, n] uint8``."""
    period, span = _period(bits)
    periods = -(-count // period)
    if words.shape[0] < periods * span:
        words = torch.cat((words, words.new_zeros(periods * span - words.shape[0], words.shape[1])))
    words = words.unflatten(0, (periods, span))
    codes = torch.empty(periods, period, words.shape[2], dtype=torch.uint8, device=words.device)
    for k in range(period):
        at, shift = divmod(k * bits, 32)
        code = words[:, at] >> shift
        if shift + bits > 32:
            code = (code & ((1 << 32 - shift) - 1)) | (words[:, at + 1] << 32 - shift)
        codes[:, k] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(0, 1)[:count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[count, n]``, each from 0 to ``2**bits - 1``, to ``[words_for(count, bits), n] int32``."""
    period, span = _period(bits)
    count, n = codes.shape
    periods = -(-count // period)
    padded = codes.new_zeros(periods * period, n)
    padded[:count] = codes
    padded = padded.unflatten(0, (periods, period))
    words = torch.zeros(periods, span, n, dtype=torch.int32, device=codes.device)
    for k in range(period):
        at, shift = divmod(k * bits, 32)
        code = padded[:, k].to(torch.int32)
        words[:, at] |= code << shift
        if shift + bits > 32:
            words[:, at + 1] |= code >> 32 - shift
    return words.flatten(0, 1)[: words_for(count, bits)]


def _period(bits: int) -> tuple[int, int]:
    """After how many codes, and words, a code starts at the beginning of a word again."""
    common = gcd(bits, 32)
    return 32 // common, bits // common
