"""The op table: order, reasons, and users' own implementations."""

from __future__ import annotations

import torch

from lmdeploy.ops.norm import rms_norm
from lmdeploy.ops.table import OpCase, op

CASE = OpCase('cpu', torch.float32)


def double(x):
    """Twice x."""
    return x * 2


def test_the_newest_implementation_without_a_reason_against_it_runs():
    twice = op(double)
    x = torch.ones(2)
    assert twice(x).tolist() == [2, 2] and twice.__doc__ == 'Twice x.'

    @twice.impl('cpu')
    def first(x):
        return x * 3

    assert twice(x).tolist() == [3, 3]  # chosen anew after a registration

    @twice.impl('cpu', when=lambda case: [] if case.dtype is torch.float64 else ['float64 only'])
    def second(x):
        return x * 4

    @twice.impl('cuda')
    def third(x):
        return x * 5

    assert twice(x).tolist() == [3, 3] and twice(x.double()).tolist() == [4, 4]
    assert twice.reference(x).tolist() == [2, 2]
    lines = twice.explain(CASE).splitlines()
    assert [line.split(': ', 2)[-1] for line in lines] == [
        'runs on cuda, not on cpu', 'float64 only', 'chosen', 'ready']  # fmt: skip


def test_a_device_without_implementations_runs_the_reference():
    twice = op(double)
    assert twice.select(OpCase('meta', torch.float32)) is double
    assert twice.explain(CASE) == 'double: reference: chosen'


def test_the_device_package_registers_itself():
    assert 'lmdeploy.ops.cpu.norm.fused_rms_norm: chosen' in rms_norm.explain(CASE)
