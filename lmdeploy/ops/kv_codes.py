"""Keys and values as codes of 8 or 4 bits: their arithmetic, and the cache write that makes them.

Every token is quantised for itself, head by head: its code depends on no other token, so that a cached prefix, a chunk
of any size and a recomputed request hold the same bytes.

Keys are prepared first, which costs no accuracy, for it is undone exactly in the scores:

* An **offset** b of the projection, its bias, dwarfs what the tokens differ in (absolute values above 100 in the first
  layers of Qwen2.5). A rotation by position p being linear, ``R_p (k + b) = R_p k + R_p b``: the first part is stored,
  and a query's product with the second, known one is added to its score (:class:`KeyOffset`).
* Codes of 4 bits are of ``R_p k A``, and queries become ``q B`` with ``A B^T = 1``: axes along which an error of a key
  matters least to its scores, spread over all channels by a **Hadamard** matrix (:class:`KeyBasis`). Without axes A and
  B are that matrix alone (Ashkboos et al. 2024, QuaRot).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.norm import rms_norm
from lmdeploy.ops.rope import rope, rope_tables
from lmdeploy.ops.table import op

MOST = 65504.0  # the largest float16: scales and zeros are clamped to it
SPAN = 256  # positions that :attr:`KeyOffset.within` holds


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the last dimension of ``x [..., D]``, in the layout of :class:`lmdeploy.kv.format.Codes`.

    A non-finite number counts as 0. The error of a number is at most half a scale, plus what rounding scale and zero
    to float16 shifts the ends of the range by: 2^-11 of the range and of its middle.

    Returns:
        ``[..., D * bits / 8] int8`` and ``[..., 2] float16``.
    """
    x = torch.nan_to_num(x.float(), 0.0, 0.0, 0.0)
    steps, half = float((1 << bits) - 1), float(1 << bits - 1)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = ((high - low) / steps).clamp_(max=MOST).half().float()
    zero = ((high + low + scale) * 0.5).clamp_(-MOST, MOST).half().float()
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    codes = ((x - zero) * inverse + 0.5).floor_().clamp_(-half, half - 1)
    scales = torch.cat((scale, zero), -1).half()
    if bits == 8:
        return codes.to(torch.int8), scales
    low_half, high_half = codes.add_(half).to(torch.uint8).chunk(2, -1)
    return (low_half | high_half << 4).view(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor, dim: int) -> Tensor:
    """``[..., D] float32`` of codes ``[..., D * bits / 8] int8`` and ``[..., 2] float16``."""
    scale, zero = scales.float().unbind(-1)
    if codes.shape[-1] == dim:
        return codes.float().mul_(scale[..., None]).add_(zero[..., None])
    raw = codes.view(torch.uint8)
    out = torch.empty(*codes.shape[:-1], dim, device=codes.device)
    out[..., : dim // 2] = raw & 15
    out[..., dim // 2 :] = raw >> 4
    return out.mul_(scale[..., None]).add_(torch.sub(zero, scale, alpha=8)[..., None])


def hadamard_block(dim: int) -> int:
    """Channels that are transformed together: all of them where that is a power of two, else a power of two that
    divides half of them."""
    return dim if dim & dim - 1 == 0 else dim // 2 & -(dim // 2)


def hadamard(x: Tensor) -> Tensor:
    """``x [..., D]`` times the orthonormal Walsh-Hadamard matrix, in blocks of channels: its own inverse. float32.

    A sum runs in one order whatever the other rows are: rows keep their bits in any batch.
    """
    block = hadamard_block(x.shape[-1])
    y = x.float().reshape(-1, block)
    size = 1
    while size < block:  # split at the leading bit, append it behind: after log2(block) turns all bits are through
        left, right = y.view(-1, 2, block // 2).unbind(1)
        y = torch.stack((left + right, left - right), -1).view(-1, block)
        size *= 2
    return y.mul_(block**-0.5).view(x.shape)


class Turns:
    """The angles of one rope: of positions, and back from where spans of positions begin."""

    def __init__(self, frequencies: Tensor, factor: float) -> None:
        self.frequencies, self.factor = frequencies, factor
        self._back: dict[int, list[Tensor]] = {}

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines as the model rotates by them."""
        return rope_tables.reference(positions, self.frequencies, self.factor)

    def back(self, step: int, count: int) -> Tensor:
        """``[at least count, 2, R] float32``: cosines and sines, for :func:`rope`, of a turn back by i * ``step``.

        Graphs keep the address of a table: what was handed out once is never freed.
        """
        made = self._back.setdefault(step, [])
        if not made or made[-1].shape[0] < count:
            size = max(count, 2 * made[-1].shape[0] if made else 16)
            positions = torch.arange(0, size * step, step, dtype=torch.int32, device=self.frequencies.device)
            cos, sin = rope_tables.reference(positions, self.frequencies, 1.0)
            made.append(torch.stack((cos[:, 0], -sin[:, 0]), 1))
        return made[-1]


@dataclass(frozen=True, slots=True)
class KeyOffset:
    """What is taken off the keys of one layer before their rotation, and so off the codes.

    Attributes:
        values: ``[kv_heads, D] float32``.
        turns: the layer's rope.
        within: ``[kv_heads, 256, D] float32``: the values as rotated to positions 0 to 255. The offset's part of a
            score at position ``p + n`` is ``(R_-p q) . R_n values``: one small table serves every span of positions.
    """

    values: Tensor
    turns: Turns
    within: Tensor = field(init=False)

    def __post_init__(self) -> None:
        positions = torch.arange(SPAN, dtype=torch.int32, device=self.values.device)
        object.__setattr__(self, 'within', self.at(positions).transpose(0, 1).contiguous())

    def at(self, positions: Tensor) -> Tensor:
        """``[T, kv_heads, D] float32``: the values as the keys at ``positions [T]`` have them in them."""
        return rope.reference(self.values.expand(len(positions), -1, -1), *self.turns.tables(positions))


@dataclass(frozen=True, slots=True)
class KeyBasis:
    """The axes of one layer's keys in codes of 4 bits: ``k A`` is stored, and met by ``q B``, with ``A B^T = 1``.

    Attributes:
        keys, queries: A and B, ``[kv_heads, D, D] float32``.
    """

    keys: Tensor
    queries: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, shrink: float = 0.1) -> KeyBasis:
        """The axes for queries ``[n, heads, D]`` and keys ``[n, kv_heads, D]`` like these, rotated; a text from its
        first token on.

        The codes of ``k T H`` all err alike, by a share of the size of ``k T``, so that a score's error is
        ``tr(T^T C T) tr(T^-1 M T^-T)`` with C and M the second moments of keys and queries. It is least where
        ``S = T T^T`` solves ``S C S = M``: the geometric mean of M and the inverse of C. ``shrink`` mixes in what all
        channels have in common, since moments of few samples are not to be trusted wholly. The first key counts as a
        tenth of all: it is unlike the others, and most queries attend to it more than to anything else (Xiao et al.
        2023, attention sinks), so that its error is in every result.
        """
        kv_heads, dim = k.shape[1:]
        q, k = (torch.nan_to_num(x.double(), 0.0, 0.0, 0.0) for x in (q, k))
        k = torch.cat((k, k[:1].expand(len(k) // 10, -1, -1)))
        grouped = q.view(len(q), kv_heads, -1, dim)
        moments = (torch.einsum('nkd,nke->kde', k, k),
                   torch.einsum('nkgd,nkge->kde', grouped, grouped))
        c, m = (_shrunk(moment.cpu(), shrink) for moment in moments)
        root, inverse = _roots(c)
        s = inverse @ _roots(root @ m @ root)[0] @ inverse
        spread = hadamard(torch.eye(dim)).double()
        keys, queries = (power @ spread for power in _roots(s))
        return cls(keys.float().to(k.device), queries.float().to(k.device))


def _shrunk(moment: Tensor, share: float) -> Tensor:
    """``moment [heads, D, D]``, of size 1 on average, with ``share`` of the unit matrix."""
    unit = torch.eye(moment.shape[-1], dtype=moment.dtype)
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    return moment / size + share * unit


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of symmetric positive matrices, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(1e-9)[..., None, :].sqrt()
    return (vectors * values) @ vectors.transpose(-1, -2), (vectors / values) @ vectors.transpose(-1, -2)


def turn(x: Tensor, axes: Tensor) -> Tensor:
    """``x [T, heads, D]`` times the matrix of its key head, ``axes [kv_heads, D, D]``; float32.

    Products have a multiple of 16 rows, so that on a CPU a token keeps its bits in any batch.
    """
    tokens, heads, dim = x.shape
    kv_heads = len(axes)
    rows = x.float().view(tokens, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    count = rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % 16))
    turned = torch.bmm(rows, axes)[:, :count]
    return turned.view(kv_heads, tokens, -1, dim).transpose(0, 1).reshape(tokens, heads, dim).contiguous()


def as_coded(x: Tensor, axes: Tensor | None) -> Tensor:
    """Keys or queries ``[T, heads, D]`` as they are, or are met, in codes of 4 bits."""
    return hadamard(x) if axes is None else turn(x, axes)


def store_codes(k: Tensor, v: Tensor, layer: KVLayer, slots: Tensor, basis: KeyBasis | None = None) -> None:
    """Quantise rotated keys ``[T, kv_heads, D]``, whose offset is off, and values; write them to ``slots [T]``."""
    block_size = layer.k.shape[2]
    bits = 8 * layer.k.shape[-1] // k.shape[-1]
    block, at = slots // block_size, slots % block_size
    if bits == 4:
        k = as_coded(torch.nan_to_num(k, 0.0, 0.0, 0.0), None if basis is None else basis.keys)
    for new, pages, scale_pages in zip((k, v), (layer.k, layer.v), layer.scales):
        codes, scales = quantise(new, bits)
        pages[block, :, at] = codes
        scale_pages[block, :, at] = scales


@op
def rope_write_codes(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
                     eps: float, offset: Tensor | None, basis: KeyBasis | None, layer: KVLayer,
                     slots: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Normalise (where there are weights) and rotate queries and keys; store keys and values as codes.

    Args:
        qkv: ``[T, heads + 2 * kv_heads, D]``.
        cos, sin: as for :func:`lmdeploy.ops.rope.rope`.
        q_weight, k_weight: ``[D]`` of the per-head norms, or None.
        offset: ``[kv_heads, D] float32``: what is taken off the keys before their rotation, or None.
        basis: of codes of 4 bits: their axes; None: those of the Hadamard matrix.
        layer: pages of codes.
        slots: ``[T] int64``: block * block_size + offset.

    Returns:
        The queries ``[T, heads, D]`` of qkv's dtype as they meet the codes, which means :func:`as_coded` where those
        are of 4 bits; and as they meet an offset, if there is one.
    """
    kv_heads = layer.k.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm.reference(q, q_weight, eps), rms_norm.reference(k, k_weight, eps)
    if offset is not None:
        k = k.float() - offset
    store_codes(rope.reference(k, cos, sin), v, layer, slots, basis)
    turned = rope.reference(q, cos, sin)
    plain = turned.to(qkv.dtype)
    coded = plain
    if layer.k.shape[-1] != qkv.shape[-1]:
        coded = as_coded(turned, None if basis is None else basis.queries).to(qkv.dtype)
    return coded, None if offset is None else plain
