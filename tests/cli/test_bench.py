"""``lmdeploy bench`` from end to end: every benchmark on a tiny model, its table and its file."""

from __future__ import annotations

import json
import re

import pytest

from lmdeploy.cli.entrypoint import main
from tests.serve.conftest import serve, tokenizer, toy_folder
from tests.serve.fake_server import MODEL, VOCAB
from tests.serve.live import live

__all__ = ['serve', 'tokenizer', 'toy_folder']

ROOF = ['--copy-gbs', '100', '--peak-tflops', '10']
ENGINE = ['--device', 'cpu', '--dtype', 'float32', *ROOF]


@pytest.fixture
def bench(capsys, monkeypatch):
    """Run one benchmark; its exit code, lines of stdout, and stderr."""
    monkeypatch.setenv('LMDEPLOY_LANG', 'en')

    def run(*argv: str) -> tuple[int, list[str], str]:
        code = main(['bench', *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def names(rows: list[str]) -> list[str]:
    return [re.split(r' {2,}', row)[0] for row in rows]


def test_throughput(bench, toy, tmp_path):
    file = tmp_path / 'report.json'
    code, lines, err = bench('throughput', toy, '--num-prompts', 4, '--input-len', 9, '--output-len', 5,
                             '--concurrency', 2, '--rounds', 3, '--json', file, *ENGINE)  # fmt: skip
    assert code == 0 and '4 x 9/5, 2 at a time, float32' in lines[0]
    assert lines[1].split()[:3] == ['round', 'output', 'tok/s']
    assert [line.split()[0] for line in lines[2:]] == ['1', 'median', '3']
    assert 'Roofline: 100.0 GB/s copied, 10.00 TFLOP/s multiplied, as given.' in err and str(file) in err
    report = json.loads(file.read_text())
    assert report['output_tokens'] == 20 and report['rounds'][1] == report['median']
    assert lines[3].endswith(f'{report["bound"]["ratio"]:.1%}')


def test_latency_of_conversations(bench, toy):
    code, lines, _ = bench('latency', toy, '--dataset', 'sharegpt-like', '--num-prompts', 1, '--seed', 4, '--rounds', 1,
                           *ENGINE)  # fmt: skip
    assert code == 0 and 'ShareGPT-like, one at a time' in lines[0]
    assert names(lines[1:]) == ['ms', 'first token', 'per output token', 'between tokens']


def test_a_folder_with_a_config_alone_has_random_weights(bench, toy, tmp_path):
    (tmp_path / 'config.json').write_bytes((toy / 'config.json').read_bytes())
    code, lines, _ = bench('throughput', tmp_path, '--load-format', 'dummy', '--num-prompts', 1, '--input-len', 4,
                           '--output-len', 2, '--rounds', 1, *ENGINE)  # fmt: skip
    assert code == 0 and lines[2].startswith('median')


def test_without_weights_it_says_what_is_missing(bench, toy, tmp_path):
    (tmp_path / 'config.json').write_bytes((toy / 'config.json').read_bytes())
    code, _, err = bench('throughput', tmp_path, *ENGINE)
    assert code in (65, 66) and 'LMD-' in err


def test_suite(bench, toy, tmp_path):
    file = tmp_path / 'suite.json'
    code, lines, _ = bench('suite', toy, '--cases', '1', '16', 'sharegpt', '--scale', '0.004', '--rounds', 1,
                           '--seed', 3, '--json', file, *ENGINE)  # fmt: skip
    assert code == 0 and names(lines[1:]) == ['case', '1 x 1/2', '16 x 4/4', '4 x ShareGPT-like']
    cases = json.loads(file.read_text())['cases']
    assert [case['benchmark'] for case in cases] == ['latency', 'throughput', 'throughput']
    assert len({case['start_seconds'] for case in cases}) == 1


def test_a_breakdown_follows_the_rounds(bench, toy):
    code, lines, _ = bench('throughput', toy, '--num-prompts', 2, '--input-len', 4, '--output-len', 6, '--rounds', 1,
                           '--breakdown', *ENGINE)  # fmt: skip
    assert code == 0 and names(lines[3:6]) == ['step', 'in all', 'kernel in a decode step']
    assert any(line.startswith('aten::') for line in lines[6:])


def test_kernels(bench, toy, tmp_path):
    file = tmp_path / 'kernels.json'
    code, lines, _ = bench('kernels', toy, '--rows', 1, '--context', 64, '--dtype', 'float32', '--device', 'cpu',
                           '--only', 'norm', '--json', file, *ROOF)  # fmt: skip
    assert code == 0 and [line.split()[0] for line in lines[1:]] == ['kernel', 'add_rms_norm', 'rms_norm']
    assert [figure['implementation'] for figure in json.loads(file.read_text())['figures']] == [
        'cpu.norm.fused_add_rms_norm', 'cpu.norm.fused_rms_norm']


def test_serve(bench, serve, tmp_path):
    file = tmp_path / 'serve.json'
    with live(serve()) as running:
        code, lines, err = bench('serve', running.url, '--num-prompts', 3, '--input-len', 8, '--output-len', 4,
                                 '--request-rate', 100, '--vocab-size', VOCAB, '--json', file)
        assert code == 0 and lines[0].startswith(f'{MODEL}, 3 x 8/4, 100 requests/s, 3 of 3 answered')
        assert names(lines[2:]) == ['ms', 'first token', 'per output token', 'between events', 'end to end']
        assert json.loads(file.read_text())['output_tokens'] == 12
        code, _, err = bench('serve', running.url, '--num-prompts', 2, '--vocab-size', 10**6)
    assert code == 1 and 'error LMD-592' in err and 'HTTP 4' in err


@pytest.mark.parametrize('argv, code, told', [
    (['throughput', 'shapes:llama9'], 66, 'LMD-590'),
    (['throughput', 'TOY', '--copy-gbs', '5'], 2, 'LMD-413'),
    (['throughput', 'TOY', '--session-len', '8', *ROOF], 78, 'LMD-591'),
    (['throughput', 'TOY', '--num-prompts', '1', '--input-len', '2', '--output-len', '1', '--rounds', '1', '--json',
      '/no/such/folder/x', *ENGINE], 2, 'LMD-408'),
    (['serve', 'ftp://x'], 78, 'LMD-581'),
    (['kernels', 'TOY', '--dtype', 'int3', '--device', 'cpu'], 78, 'LMD-205')])  # fmt: skip
def test_what_cannot_be_measured_is_told(bench, toy, argv, code, told):
    got, _, err = bench(*(str(toy) if word == 'TOY' else word for word in argv))
    assert (got, told in err) == (code, True), err


@pytest.mark.parametrize('argv', [['throughput', 'x', '--rounds', '0'], ['throughput'],
                                  ['latency', 'x', '--seed', '-1'], ['serve', 'x', '--request-rate', '0'],
                                  ['serve', 'x', '--request-rate', 'nan'], []])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as leave:
        main(['bench', *argv])
    assert leave.value.code == 2 and 'usage: lmdeploy bench' in capsys.readouterr().err
