"""``load(save(b)) == b`` for random layers of every format: shapes, groups, widths, orders, biases."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.config.quantization import AWQ, FLOAT, FP8, GPTQ, INT, PACK, SMOOTH, Storage
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.policy import FORMATS
from lmdeploy.quant.scheme import QuantScheme
from tests.quant.formats.test_dense_gguf import saved

E4M3 = 'float8_e4m3fn'


@st.composite
def storages(draw: st.DrawFn) -> Storage:
    form = draw(st.sampled_from([AWQ, GPTQ, PACK, INT, FLOAT, FP8, SMOOTH]))
    group, symmetric = draw(st.sampled_from([0, 8, 24, 32])), draw(st.booleans())
    if form == AWQ:
        return Storage(AWQ, bits=4, group=group, symmetric=symmetric)
    if form == GPTQ:
        return Storage(GPTQ, bits=draw(st.sampled_from([2, 3, 4, 8])), group=group, symmetric=symmetric,
                       zero_shift=draw(st.integers(0, 1)))  # fmt: skip
    active = draw(st.sampled_from(['', 'int8' if form in (PACK, INT, SMOOTH) else E4M3]))
    if form in (PACK, INT):
        return Storage(form, bits=draw(st.integers(2, 8)), group=group, symmetric=symmetric, activation=active)
    if form == SMOOTH:
        return Storage(SMOOTH, activation='int8')
    rows = draw(st.sampled_from([1, 16])) if form == FLOAT else draw(st.sampled_from([0, 16]))
    return Storage(form, E4M3, 8, group or 16 if rows > 1 else 0, rows, activation=active)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Storage, LinearBundle]:
    """A storage and a random bundle that it can hold."""
    storage = draw(storages())
    inputs = draw(st.integers(1, 4)) * (32 if storage.format == GPTQ else draw(st.integers(1, 9)))
    outputs = draw(st.integers(1, 4)) * (8 if storage.format == AWQ else draw(st.integers(1, 9)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    groups = -(-inputs // storage.group) if storage.group else 1
    scheme = QuantScheme(storage.kind, storage.bits, storage.group, storage.symmetric, storage.activation,
                         storage.activation_group, storage.static)  # fmt: skip
    count, half = 1 << storage.bits, 1 << storage.bits - 1
    scales = torch.rand(groups, outputs, generator=random) + 0.5
    if storage.rows > 1:
        scales = scales[:, :: storage.rows].repeat_interleave(storage.rows, 1)[:, :outputs]
    zeros = None
    if storage.kind != 'int':
        codes = torch.randn(inputs, outputs, generator=random).to(torch.float8_e4m3fn)
    elif storage.symmetric:
        codes = torch.randint(-half, half, (inputs, outputs), generator=random, dtype=torch.int8)
    else:
        codes = torch.randint(0, count, (inputs, outputs), generator=random, dtype=torch.uint8)
        zeros = torch.randint(storage.zero_shift, count, (groups, outputs), generator=random, dtype=torch.int16)
    bundle = LinearBundle(scheme, outputs, inputs, codes=codes, scales=scales, zeros=zeros)
    if draw(st.booleans()):
        bundle.bias = torch.randn(outputs, generator=random)
    if storage.format in (GPTQ, PACK) and storage.group and draw(st.booleans()):
        bundle = replace(bundle, perm=an_order(inputs, storage.group, random))
    return storage, bundle


def an_order(inputs: int, group: int, random: torch.Generator) -> torch.Tensor | None:
    """Channels in groups at random, ascending inside of each, as sorting by group leaves them."""
    groups = (torch.arange(inputs) // group)[torch.randperm(inputs, generator=random)]
    order = groups.argsort(stable=True)
    return None if torch.equal(order, torch.arange(inputs)) else order


@given(layers())
@settings(max_examples=150, deadline=None)
def test_load_of_save_is_the_same(drawn: tuple[Storage, LinearBundle]) -> None:
    storage, bundle = drawn
    form = FORMATS[storage.format](storage)
    with tempfile.TemporaryDirectory() as folder:
        prefix = saved(Path(folder), form.save(bundle))
        with prefix.checkpoint as checkpoint:
            layout, again = form.describe(prefix, torch.float32), form.load(prefix, torch.float32)
            checkpoint.finish()
    assert layout.scheme == again.scheme == bundle.scheme
    for name in ('codes', 'scales', 'zeros', 'bias', 'perm'):
        one, other = getattr(bundle, name), getattr(again, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype and torch.equal(one.float(), other.float()), name
    assert torch.equal(form.dequant(again), form.dequant(bundle))
