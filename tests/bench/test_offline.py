"""Throughput and latency of a tiny model: what is counted, what is bounded, what is written."""

from __future__ import annotations

import json

import pytest

from lmdeploy.bench.offline import Bench
from lmdeploy.bench.report import Spread, Table, shown, write_json
from lmdeploy.bench.roofline import Roof
from lmdeploy.bench.workload import Workload, fixed
from lmdeploy.config.engine import EngineConfig
from lmdeploy.errors import ConfigError

ROOF = Roof(1e12, 1e15)


@pytest.fixture(scope='module')
def bench(toy):
    made = Bench(EngineConfig(device='cpu', dtype='float32'), toy, 'toy', longest=40)
    yield made
    made.close()


def test_throughput(bench):
    report = bench.throughput(fixed(4, 12, 6), rounds=3, seed=5, concurrency=2, roof=ROOF)
    median = report.median
    assert (report.requests, report.prompt_tokens, report.output_tokens, report.concurrency) == (4, 48, 24, 2)
    assert len(report.rounds) == 3 and [one.seconds for one in report.rounds] == sorted(
        one.seconds for one in report.rounds)
    assert median is report.rounds[1]
    assert median.output_tokens_per_second == pytest.approx(24 / median.seconds)
    assert median.total_tokens_per_second == pytest.approx(72 / median.seconds)
    assert median.requests_per_second == pytest.approx(4 / median.seconds)
    assert 0 < report.bound.ratio < 1 and report.bound.ratio == report.bound.seconds / median.seconds
    assert report.cost.weight_bytes == 4 and report.dtype == 'float32' and report.runs['attention'] == 'cpu_spans'
    assert bench.core.idle and bench.core.scheduler.pool.used == 0


def test_the_whole_session_can_be_used(bench):
    report = bench.throughput(Workload('long', (30, 3), (10, 2)), rounds=1, seed=0, roof=ROOF)
    assert report.output_tokens == 12 and bench.config.session_len == 40


def test_the_breakdown_adds_up(bench):
    report = bench.throughput(fixed(3, 12, 8), rounds=1, seed=0, roof=ROOF, inside=True)
    found = report.breakdown
    assert found is not None and 0 < found.host_ms < found.step_ms and not found.graphs and found.graph_ms == 0
    assert any(kernel.name.startswith('aten::') for kernel in found.kernels)
    assert [kernel.us_per_step for kernel in found.kernels] == sorted(
        (kernel.us_per_step for kernel in found.kernels), reverse=True)
    assert bench.core.idle and bench.core.scheduler.pool.used == 0


def test_latency(bench):
    report = bench.latency(fixed(3, 12, 6), rounds=1, seed=0, roof=ROOF)
    median = report.median
    assert median.between_tokens is not None and median.first_token is not None and median.per_token is not None
    assert 0 < median.per_token.p50 <= median.per_token.p99 and report.concurrency == 1
    assert report.bound.per_token_ms is not None and 0 < report.bound.per_token_ms < median.per_token.mean
    assert 0 < report.bound.first_token_ratio < 1
    alone = bench.latency(fixed(1, 12, 1), rounds=1, seed=0, roof=ROOF)
    assert alone.median.per_token is None and alone.bound.per_token_ms is None


def test_a_request_that_is_too_long_is_refused_before_anything_loads(toy):
    with pytest.raises(ConfigError) as error:
        Bench(EngineConfig(device='cpu', session_len=20), toy, 'toy', longest=21)
    assert error.value.code == 'LMD-591'


def test_the_report_is_json_with_all_its_facts(bench, tmp_path):
    report = bench.throughput(fixed(1, 4, 2), rounds=1, seed=0, roof=ROOF)
    write_json(tmp_path / 'report.json', report)
    read = json.loads((tmp_path / 'report.json').read_text())
    assert read['engine']['prefix_caching'] is False and read['device']['kind'] == 'cpu'
    assert read['environment']['packages']['torch'] and 'commit' in read['environment']
    assert read['bound']['ratio'] == report.bound.ratio and read['roof'] == {
        'copy': 1e12, 'peak': 1e15, 'attention': 0.0, 'source': 'given'}
    assert read['median'] == read['rounds'][0]


def test_spreads_and_tables(capsys):
    assert Spread.of([]) is None
    assert Spread.of([i / 1000 for i in range(101)]) == Spread(50.0, 50.0, 90.0, 99.0)
    table = Table(('name', 'figure'))
    table.add('a longer one', shown(1234.5))
    table.add('b', shown(0.12345))
    table.print()
    assert capsys.readouterr().out == 'name          figure\na longer one   1,234\nb              0.123\n'
