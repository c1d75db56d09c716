"""Codes of keys and values: how far a number may move, that a token is alone with its codes, and what undoes what."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kv.cache import KVCache, KVLayer, KVShape
from lmdeploy.ops.kv_codes import (
    SPAN,
    KeyBasis,
    KeyOffset,
    Turns,
    dequantise,
    hadamard,
    hadamard_block,
    quantise,
    rope_write_codes,
    store_codes,
    turn,
)
from lmdeploy.ops.paged_attention import code_attention, paged_attention, read_codes
from lmdeploy.ops.rope import rope, rope_tables

DIMS = (16, 64, 80, 96, 128, 256)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes and middles, some of them constant."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (4 * torch.rand(*shape[:-1], 1, generator=generator) - 3)
    middle = 100 * torch.randn(*shape[:-1], 1, generator=generator) * (torch.rand(*shape[:-1], 1) < 0.5)
    x = torch.randn(*shape, generator=generator) * spread + middle
    x[0] = 3.3
    return x


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('dim', DIMS)
def test_the_error_of_a_number(bits, dim):
    """Half a step, and what rounding to float16 moves the ends of the range by."""
    x = numbers(200, 3, dim)
    codes, scales = quantise(x, bits)
    assert codes.shape == (200, 3, dim * bits // 8) and codes.dtype is torch.int8 and scales.shape == (200, 3, 2)
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    moved = 2**-11 * ((high - low) + (high + low + step).abs() / 2) + 2**-24 * 2**bits
    error = (dequantise(codes, scales, dim) - x).abs()
    assert (error <= 0.5 * step * (1 + 2**-10) + moved * 1.01).all()
    assert (error[0] <= 3.3 * 2**-11).all()  # of a constant: one rounding


@pytest.mark.parametrize('bits', [8, 4])
def test_what_is_not_finite_or_too_large_stays_finite(bits):
    x = torch.tensor([[float('nan'), 1.0, -1.0, 0.5], [float('inf'), -float('inf'), 2.0, 1.0],
                      [3e38, -3e38, 0.0, 1.0], [1e6, 1e6, 1e6, 1e6], [1e-30, 0.0, 0.0, 0.0]])
    found = dequantise(*quantise(x, bits), 4)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], torch.tensor([0.0, 1.0, -1.0, 0.5]), atol=0.07, rtol=0)


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('dim', [64, 80])
def test_a_token_is_alone_with_its_codes(bits, dim):
    x = numbers(64, 2, dim)
    for change in (lambda y: y, hadamard):
        codes, scales = quantise(change(x), bits)
        for rows in ([5], [63, 0], list(range(7, 40))):
            some_codes, some_scales = quantise(change(x[rows]), bits)
            assert torch.equal(some_codes, codes[rows]) and torch.equal(some_scales, scales[rows])


@pytest.mark.parametrize('dim', DIMS)
def test_the_transform_is_its_own_inverse_and_keeps_products(dim):
    x, y = torch.randn(2, 9, dim)
    block = hadamard_block(dim)
    assert dim % block == 0 and block & block - 1 == 0
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-4, rtol=1e-4)
    spike = torch.zeros(dim)
    spike[3] = 1.0
    torch.testing.assert_close(hadamard(spike).abs()[:block], torch.full((block,), block**-0.5))


def offset_of(kv_heads: int, dim: int, rotated: int, size: float = 100.0, factor: float = 1.0) -> KeyOffset:
    generator = torch.Generator().manual_seed(1)
    frequencies = 1 / 10000 ** (torch.arange(rotated // 2) / (rotated // 2))
    return KeyOffset(size * torch.randn(kv_heads, dim, generator=generator), Turns(frequencies, factor))


@pytest.mark.parametrize(('rotated', 'factor'), [(32, 1.0), (16, 1.0), (32, 1.2)])
def test_an_offset_is_given_back(rotated, factor):
    """What the keys would be without codes: projection with its bias, rotated. Only what remains is quantised."""
    offset = offset_of(2, 32, rotated, factor=factor)
    generator = torch.Generator().manual_seed(2)
    tokens = 150
    qkv = torch.randn(tokens, 10, 32, generator=generator)
    plain = qkv[:, 6:8].clone()
    qkv[:, 6:8] += offset.values
    cos, sin = offset.turns.tables(torch.arange(tokens, dtype=torch.int32))
    layer = KVCache(KVShape(1, 2, 32, 8), 3).layer(0)
    q, as_it_meets = rope_write_codes.reference(qkv, cos, sin, None, None, 1e-6, offset.values, None, layer,
                                                64 + torch.arange(tokens))  # fmt: skip
    assert as_it_meets is not None and torch.equal(q, as_it_meets)
    k, v = (x[0, :, :tokens].transpose(0, 1) for x in read_codes(layer, torch.tensor([[1, 2, 3]]), offset, 32))
    steps = (rope(plain, cos, sin).aminmax(dim=-1, keepdim=True)[i] for i in (1, 0))
    step = (next(steps) - next(steps)) / 255
    assert ((k - rope(qkv[:, 6:8], cos, sin)).abs() <= 0.6 * step + 1e-4).all()
    torch.testing.assert_close(v, qkv[:, 8:], atol=0.02, rtol=0)


def test_a_score_needs_only_the_offset_within_a_span():
    """R_(p+n) b meets q as R_n b meets q turned back by p."""
    offset = offset_of(2, 32, 16, factor=1.1)
    q = torch.randn(3, 2, 32)
    turned = offset.turns.back(SPAN, 5)[4]
    back = rope(q, turned[:1], turned[1:])
    positions = torch.arange(4 * SPAN, 5 * SPAN, dtype=torch.int32)
    wanted = torch.einsum('thd,nhd->thn', q, offset.at(positions))
    torch.testing.assert_close(torch.einsum('thd,hnd->thn', back, offset.within), wanted, atol=0.05, rtol=1e-3)


@pytest.mark.parametrize(('bits', 'with_basis'), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize('with_offset', [False, True])
@pytest.mark.parametrize(('heads', 'kv_heads', 'dim', 'block', 'window'), [
    (8, 4, 80, 64, 0), (6, 2, 96, 128, 100), (14, 2, 64, 320, 300)])
def test_attention_over_codes_is_attention_over_what_they_stand_for(heads, kv_heads, dim, block, window, with_offset,
                                                                    bits, with_basis):  # fmt: skip
    lens, queries = [700, 290, 65, 1], [1, 100, 65, 1]
    start = [0, 1, 101, 166, 167]
    counts = [-(-n // block) for n in lens]
    table = torch.zeros(4, max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.arange(count) + 1 + sum(counts[:row])
    offset = offset_of(kv_heads, dim, dim, size=5.0) if with_offset else None
    codes = KVCache(KVShape(1, kv_heads, dim, bits), sum(counts), block).layer(0)
    spots = torch.arange((sum(counts) + 1) * block)
    k, v = torch.randn(2, len(spots), kv_heads, dim)
    basis = KeyBasis.of(torch.randn(99, heads, dim), k[:99]) if with_basis else None
    store_codes(k, v, codes, spots, basis)
    plain = KVLayer(*(torch.zeros(sum(counts) + 1, kv_heads, block, dim) for _ in 'kv'))
    for row in range(4):
        k, v = read_codes(codes, table[row : row + 1], offset, dim, basis)
        for pages, found in ((plain.k, k), (plain.v, v)):
            pages[table[row].long()] = found[0].view(kv_heads, -1, block, dim).transpose(0, 1)
    q = torch.randn(start[-1], heads, dim) / 2
    wanted = paged_attention.reference(q, plain.k, plain.v, table, start, lens, dim**-0.5, window)
    assert queries == [b - a for a, b in zip(start, start[1:])]
    arguments = (codes, offset, table, start, lens, dim**-0.5, window, basis)
    torch.testing.assert_close(code_attention(q, *arguments), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(span_attention(q, *arguments), wanted, atol=2e-4, rtol=2e-4)


def span_attention(q, layer, offset, table, start, lens, scale, window, basis):
    """As a model on a CPU attends."""
    from lmdeploy.ops.cpu.paged_attention import attend
    from lmdeploy.ops.cpu.spans import Shape, build_chunks

    shape = Shape(q.shape[1], layer.k.shape[1], q.shape[2], layer.k.shape[2])
    return attend(q, layer, build_chunks(start, lens, table, shape, window), scale, q.dtype, offset,
                  basis)  # fmt: skip


def test_tables_that_grow_leave_the_old_ones_in_place():
    turns = Turns(torch.rand(8), 1.0)
    small = turns.back(64, 3)
    address, values = small.data_ptr(), small.clone()
    large = turns.back(64, 1000)
    assert len(large) >= 1000 and torch.equal(large[: len(small)], values) and turns.back(64, 5) is large
    assert small.data_ptr() == address and torch.equal(small, values)
    cos, sin = rope_tables(torch.tensor([128], dtype=torch.int32), turns.frequencies, 1.0)
    assert torch.equal(large[2], torch.stack((cos[0, 0], -sin[0, 0])))


def test_axes_keep_products_and_make_errors_matter_less():
    """Queries that share a direction: an error along it would count in every score."""
    generator = torch.Generator().manual_seed(3)
    size = torch.logspace(1, -1, 64)[torch.randperm(64, generator=generator)]
    common = 20 * torch.randn(1, 6, 64, generator=generator)
    q = torch.randn(400, 6, 64, generator=generator) / size + common
    k = torch.randn(400, 2, 64, generator=generator) * size
    basis = KeyBasis.of(q[:200], k[:200])
    turned_q, turned_k = turn(q, basis.queries), turn(k, basis.keys)

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.einsum('tkgd,skd->tkgs', queries.view(-1, 2, 3, 64), keys)

    wanted = scores(q, k)
    torch.testing.assert_close(scores(turned_q, turned_k), wanted, atol=0.02, rtol=1e-3)
    with_axes, without = (
        (scores(queries, dequantise(*quantise(keys, 4), 64)) - wanted).pow(2).mean()
        for queries, keys in ((turned_q, turned_k), (hadamard(q), hadamard(k))))
    assert with_axes < without / 3
    assert torch.equal(turn(k[:7], basis.keys), turn(k, basis.keys)[:7])
