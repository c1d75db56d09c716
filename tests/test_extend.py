"""Kernels of others: chosen before ours, seen in explain(), run by the model, and gone when they are withdrawn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmdeploy import extend
from lmdeploy.attention import backend as attention
from lmdeploy.attention.reference import Reference
from lmdeploy.bench.measure import run
from lmdeploy.bench.workload import fixed
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.errors import ConfigError
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.quant import kernels
from tests.toy import write_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('extend') / 'toy')


def answers(toy: Path) -> tuple[list[list[int]], dict[str, str]]:
    """Greedy tokens of two prompts by an engine that starts now, and what it chose."""
    executor = LocalExecutor(EngineConfig(device='cpu', dtype='float32', session_len=64), toy)
    core = EngineCore(executor, executor.start())
    tokens: dict[str, list[int]] = {}
    step = core.step

    def noting():
        deltas = step()
        for delta in deltas:
            tokens.setdefault(delta.id, []).extend(delta.tokens)
        return deltas

    core.step = noting  # type: ignore[method-assign]
    run(core, fixed(2, 9, 8).requests(core.scheduler.capacity.vocab_size))
    chosen = core.scheduler.capacity.choices
    executor.stop()
    return [tokens[name] for name in sorted(tokens)], chosen


def lines(what: str) -> list[str]:
    """What is said of ``what``, without our kernels for GPUs: they are named once somebody has imported them."""
    explained = [line for line in extend.explain('cpu', 'float32').splitlines() if 'lmdeploy.ops.triton' not in line]
    return [line.partition(': ')[2] for line in explained if line.startswith(f'{what}: ')]


def test_an_own_op_runs_in_the_model_and_is_seen(toy):
    rms_norm, calls = extend.get_op('rms_norm'), []
    add_rms_norm = extend.get_op('add_rms_norm')
    before, _ = answers(toy)

    @rms_norm.impl('cpu', when=lambda case: [] if case.dtype is torch.float32 else ['float32 only'])
    def my_rms_norm(x, weight, eps):
        calls.append(x.shape)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    @add_rms_norm.impl('cpu')
    def my_add_rms_norm(x, residual, weight, eps):
        total = x + residual
        return my_rms_norm(total, weight, eps), total

    try:
        assert lines('rms_norm') == [f'{__name__}.my_rms_norm: chosen', 'lmdeploy.ops.cpu.norm.fused_rms_norm: ready',
                                     'reference: ready']
        assert 'my_rms_norm: float32 only' in rms_norm.explain(extend.OpCase('cpu', torch.bfloat16))
        x, weight = torch.randn(3, 64), torch.randn(64)
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))
        calls.clear()
        assert answers(toy)[0] == before and len(calls) >= 5 * 8  # 2 layers and the last norm, 8 steps
    finally:
        rms_norm.withdraw(my_rms_norm)
        add_rms_norm.withdraw(my_add_rms_norm)
    assert lines('rms_norm')[0] == 'lmdeploy.ops.cpu.norm.fused_rms_norm: chosen'


def test_an_op_registered_before_ours_are_imported_still_goes_first():
    code = ('import torch\nfrom lmdeploy.ops.norm import rms_norm\n'
            "@rms_norm.impl('cpu')\ndef mine(x, weight, eps): return x\n"
            'import lmdeploy.ops.cpu\n'
            'x = torch.ones(4)\nassert rms_norm(x, x, 0.1) is x\n'
            "from lmdeploy.extend import explain\nassert 'rms_norm: __main__.mine: chosen' in explain('cpu')")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0, out.stderr


def test_an_own_attention_backend_serves_the_model(toy):
    before, _ = answers(toy)

    class Mine(Reference):
        name = 'mine'

        def refuse(self, case, device, dtype):
            return [] if dtype is torch.float32 else ['float32 only']

    mine = extend.register_attention(Mine())
    try:
        assert lines('attention') == ['mine: chosen', 'cpu_spans: ready', 'triton_paged: runs on cuda, not on cpu',
                                      'reference: ready']
        assert 'attention: mine: float32 only' in extend.explain('cpu', 'bfloat16')
        tokens, chosen = answers(toy)
        assert tokens == before and chosen['attention'] == 'mine'
    finally:
        attention.withdraw(mine)
    assert lines('attention')[0] == 'cpu_spans: chosen'


def test_own_linear_and_gated_kernels_serve_the_model(toy):
    before, _ = answers(toy)

    class Plain(kernels.Dense):
        name = 'plain'
        used = 0

        def apply(self, x, packed):
            Plain.used += 1
            return torch.nn.functional.linear(x, *packed)

    class Gated(kernels.Merged):
        name = 'two_steps'

    linear, gated = extend.register_linear(Plain()), extend.register_gated(Gated())
    try:
        assert lines('linear layer')[0] == 'plain: chosen' and lines('linear layer')[1].endswith(': ready')
        assert lines('gated layers')[0] == 'two_steps: chosen'
        tokens, chosen = answers(toy)
        assert tokens == before and Plain.used > 0 and 'plain' in chosen['linear']
    finally:
        kernels.withdraw(linear)
        kernels.withdraw(gated)
    assert 'plain' not in extend.explain('cpu')


def test_an_unknown_op_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError) as error:
        extend.get_op('rms_nrom')
    assert error.value.code == 'LMD-212' and 'rms_norm' in error.value.text('en')


def install(folder: Path, source: str) -> None:
    """What pip leaves of a package with one module and an entry point."""
    (folder / 'their_kernels.py').write_text(source)
    info = folder / 'their_kernels-1.2.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: their-kernels\nVersion: 1.2\n')
    (info / 'entry_points.txt').write_text('[lmdeploy.kernels]\ntheirs = their_kernels\n')


def check_env(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{folder}', 'LMDEPLOY_LANG': 'en'}
    return subprocess.run([sys.executable, '-m', 'lmdeploy', 'check_env', '--explain'], capture_output=True, text=True,
                          env=environment, timeout=120)


def test_kernels_of_an_installed_package_are_known_to_every_process(tmp_path):
    install(tmp_path, "from lmdeploy.extend import get_op\n\n@get_op('silu_mul').impl('cpu')\n"
                      'def quick(x):\n    gate, up = x.chunk(2, -1)\n    return gate.sigmoid() * gate * up\n')
    out = check_env(tmp_path)
    assert out.returncode == 0, out.stderr
    assert [line for line in out.stdout.splitlines() if line.startswith('silu_mul: ')][:2] == [
        'silu_mul: their_kernels.quick: chosen', 'silu_mul: lmdeploy.ops.cpu.activation.exact_silu_mul: ready']


def test_a_package_that_cannot_be_imported_is_named(tmp_path):
    install(tmp_path, 'import no_such_library\n')
    out = check_env(tmp_path)
    assert out.returncode == 78
    assert 'LMD-211' in out.stderr and 'their-kernels 1.2' in out.stderr and 'no_such_library' in out.stderr
