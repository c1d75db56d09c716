"""``lmdeploy lite``: every method by its command line, what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from lmdeploy.cli.entrypoint import main
from lmdeploy.hub.datasets import Unavailable
from lmdeploy.lite import corpora
from tests.toy import TEXT, write_model

QUICK = ['--calib-samples', '4', '--calib-seqlen', '32', '--eval-tokens', '32', '--no-answers', '--device', 'cpu']
METHODS = {
    'auto_awq': ('awq', ['--w-group-size', '32', '--w-bits', '4', '--batch-size', '1']),
    'auto_gptq': ('gptq', ['--w-group-size', '32', '--w-bits', '8']),
    'smooth_quant': ('smooth_quant', ['--quant-dtype', 'fp8', '--search-scale']),
    'w4a8': ('compressed-tensors', ['--w-group-size', '32', '--rotation', 'portable']),
    'w3': ('compressed-tensors', ['--w-group-size', '32', '--effort', 'fast']),
    'w2': ('compressed-tensors', ['--w-group-size', '32']),
    'auto': ('compressed-tensors', ['--w-group-size', '32', '--bits', '4.5']),
}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('lite') / 'model', head_dim=16)


@pytest.fixture
def lite(capsys, monkeypatch, tmp_path):
    """Run one method; its exit code, stdout and stderr."""
    def nothing(name):
        raise Unavailable('there is no network')

    monkeypatch.setenv('LMDEPLOY_LANG', 'en')
    monkeypatch.setattr(corpora, 'treebank', nothing)
    monkeypatch.chdir(tmp_path)

    def run(*argv) -> tuple[int, str, str]:
        code = main(['lite', *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize('method', METHODS)
def test_methods(lite, model, tmp_path, method):
    wanted, flags = METHODS[method]
    code, out, err = lite(method, model, '--work-dir', 'out', '--calib-dataset', 'ptb', *flags, *QUICK)
    assert code == 0, err
    assert any(line.startswith(f'lite {method}: ') for line in err.splitlines()[:4])
    assert 'there is no network' in ' '.join(err.split()) and 'layer 2/2  qkv ' in err
    assert 'bits per weight' in out and 'lmdeploy chat out' in out and 'code (' in out
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['quantization_config']['quant_method'] == wanted
    report = json.loads((tmp_path / 'out' / 'quant_report.json').read_text())
    assert len(report['layers']) == 2 and report['calibration']['name'] == 'bundled'
    page = (tmp_path / 'out' / 'quant_report.html').read_text()
    assert page.count('<svg') >= 3 and 'http' not in page.replace('http://www.w3.org', '')
    code, out, err = lite(method, model, '--work-dir', 'out', '--calib-dataset', 'ptb', *flags, *QUICK)
    assert code == 0 and 'nothing was done' in err and 'bits per weight' in out


def test_the_result_answers(lite, model, tmp_path, capsys):
    (tmp_path / 'text.txt').write_text('\n\n'.join(TEXT * 20))
    assert lite('auto_awq', model, '--w-group-size', '32', '--calib-dataset', 'text.txt', *QUICK)[0] == 0
    assert main(['chat', 'work_dir', '-q', 'hello', '--max-new-tokens', '3', '--backend', 'pytorch', '--device',
                 'cpu']) == 0  # fmt: skip


def test_calibrate(lite, model, tmp_path):
    code, out, err = lite('calibrate', model, '--work-dir', 'out', '--search-scale', *QUICK)
    assert code == 0, err
    found = load_file(tmp_path / 'out' / 'inputs_stats.safetensors')
    assert {name.rpartition('.')[2] for name in found} >= {'absmax', 'absmean', 'max', 'min', 'mean'}
    name = 'model.layers.1.mlp.down_proj'
    assert found[f'{name}.absmax'].shape == (96,) and (found[f'{name}.absmax'] >= found[f'{name}.absmean']).all()
    assert json.loads((tmp_path / 'out' / 'calibration.json').read_text())['tokens'] == 128


def test_compare(lite, model, tmp_path):
    code, out, err = lite('compare', model, '--work-dir', 'out', '--forms', 'w4a8+kv8', *QUICK)
    assert code == 0, err
    report = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert [row['name'] for row in report['rows']] == ['FP16', 'W4A8 + KV8']
    assert report['rows'][0]['accuracy'] == 1.0 and all(row['tokens_per_second'] > 0 for row in report['rows'])
    assert 'relative accuracy' in out and (tmp_path / 'out' / 'compare.html').read_text().count('<svg') == 4


@pytest.mark.parametrize(('argv', 'code', 'words'), [
    (['auto_awq', '{model}', '--w-group-size', '128'], 78, ['groups of 128', '64 inputs', '--w-group-size 32']),
    (['auto_awq', '{model}', '--w-bits', '8'], 78, ['--w-bits cannot be 8', 'auto_gptq']),
    (['auto_gptq', '{model}', '--w-bits', '5'], 78, ['--w-bits cannot be 5']),
    (['smooth_quant', '{model}', '--quant-dtype', 'float8_e5m2', '--format', 'compressed-tensors'], 78, ['--format']),
    (['smooth_quant', '{model}', '--calib-dataset', 'nonsense'], 78, ["named 'nonsense'", 'ptb']),
    (['smooth_quant', '{model}', '--calib-seqlen', '100000'], 78, ['--calib-seqlen 100000', '512']),
    (['compare', '{model}', '--forms', 'w1'], 78, ['--forms cannot be w1', 'w4a16']),
    (['auto_awq', './nowhere'], 66, ['LMD-']),
])  # fmt: skip
def test_refusals(lite, model, tmp_path, argv, code, words):
    found, out, err = lite(*(part.format(model=model) for part in argv), '--device', 'cpu')
    assert found == code
    err = ' '.join(err.split())
    assert all(word in err for word in words), err
    assert not (tmp_path / 'work_dir').exists()


def test_a_quantised_model_is_not_quantised_again(lite, model):
    assert lite('smooth_quant', model, '--work-dir', 'out', *QUICK)[0] == 0
    code, _, err = lite('auto_awq', 'out', '--work-dir', 'again', *QUICK)
    assert code == 78 and 'LMD-600' in err


def test_the_first_line_comes_at_once(model, tmp_path):
    command = [sys.executable, '-X', 'importtime', '-m', 'lmdeploy', 'lite', 'auto_awq', str(tmp_path / 'nothing')]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    loaded = []
    for line in process.stderr:
        if line.startswith('lite auto_awq'):
            break
        loaded.append(line)
    process.kill()
    process.wait()
    assert loaded and not any(line.rstrip().endswith('| torch') for line in loaded)


@pytest.mark.parametrize(('text', 'size'), [('4.2GB', 4_200_000_000), ('900 MiB', 900 << 20), ('12', 12),
                                            ('1.5k', None), ('-1GB', None), ('much', None)])  # fmt: skip
def test_sizes(text, size):
    from lmdeploy.cli.lite_auto import size_of
    from lmdeploy.errors import ConfigError

    if size is not None:
        assert size_of(text) == size
        return
    with pytest.raises(ConfigError, match='such as 4.2GB'):
        size_of(text)


def test_a_budget_that_cannot_be_kept(lite, model, tmp_path):
    code, _, err = lite('auto', model, '--work-dir', 'out', '--budget', '1KB', *QUICK)
    assert code != 0 and 'LMD-633' in err and not (tmp_path / 'out').exists()
