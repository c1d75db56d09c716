"""The accuracy protocol: a model against itself is exactly 0, and what is simulated is what the engine computes."""

from __future__ import annotations

import importlib
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.registry import build_model
from lmdeploy.nn.build import Build
from lmdeploy.weights.checkpoint import open_checkpoint
from tests.lite.runs import RECIPES, ids, options, run
from tests.models.driver import Driver, load_model

HERE = Path(__file__).parents[2] / 'benchmark' / 'accuracy'
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def bench():
    """The modules of benchmark/accuracy, which are scripts."""
    sys.path.insert(0, str(HERE))
    try:
        yield {name: importlib.import_module(name) for name in ('evaluate', 'texts', 'run')}
    finally:
        sys.path.remove(str(HERE))
        for name in ('evaluate', 'texts', 'run', 'permute'):
            sys.modules.pop(name, None)


def logits(evaluate, folder, tokens, bits=16):
    model = evaluate.load(folder, CPU)
    return evaluate.hidden(model, tokens[None], bits)[0] @ model.head.t()


@pytest.mark.parametrize('name', ['gptq', 'w3', 'w4a8', 'int8', 'fp8'])
def test_every_format_is_read_as_the_engine_reads_it(bench, toy, text, tmp_path, name):
    run(toy, RECIPES[name](), options(tmp_path / 'out', text))
    tokens = ids(40, 7)
    found = logits(bench['evaluate'], tmp_path / 'out', tokens)
    wanted = Driver(load_model(tmp_path / 'out')).sequence(tokens.tolist())
    assert (found - wanted).norm() < (2e-3 if name in ('gptq', 'w3') else 0.03) * wanted.norm()


@pytest.mark.parametrize('bits', [8, 4])
def test_caches_round_as_the_engines_do(bench, toy, bits):
    tokens = ids(40, 7)
    with open_checkpoint(toy) as checkpoint:
        model = build_model(ModelConfig.from_dict(checkpoint.config), Build(torch.float32, CPU, kv_bits=bits))
        model.load(checkpoint.prefix())
    wanted = Driver(model).sequence(tokens.tolist())
    found, plain = (logits(bench['evaluate'], toy, tokens, b) for b in (bits, 16))
    rounding = (wanted - plain).norm()
    assert rounding > 0 and (found - wanted).norm() < 0.1 * rounding + 1e-4 * plain.norm()


def test_the_control_is_exactly_nothing(bench, toy):
    evaluate, tokens = bench['evaluate'], ids(40, 7)
    model, again = (evaluate.load(toy, CPU) for _ in range(2))
    first, second = (evaluate.hidden(one, tokens[None])[0] for one in (model, again))
    window = evaluate.compare('wiki', 0, tokens, first, second, model.head, again.head)
    assert window.before == window.after and window.kl == 0 and window.same == window.tokens == 39
    other = evaluate.compare('wiki', 0, tokens, first, second + 0.1, model.head, again.head)
    assert other.kl > 0 and other.before == window.before
    losses = -(first[:-1] @ model.head.t()).log_softmax(-1).gather(1, tokens[1:, None])
    assert window.before == pytest.approx(float(losses.sum()), rel=1e-5)


def test_a_run_goes_on_where_it_was(bench, tmp_path):
    evaluate = bench['evaluate']
    results = evaluate.Results(tmp_path / 'windows.jsonl')
    for i, after in enumerate((11.0, 12.0, 13.0)):
        results.add('w4', evaluate.Window('zh', i, 10, 10.0, after, 0.5, 9))
    found = evaluate.Results(tmp_path / 'windows.jsonl')
    assert found.of('w4') == results.of('w4') and found.done('w4', 'zh', 2) and not found.done('w4', 'zh', 3)
    summary = evaluate.summarise(found.of('w4'))
    assert summary.tokens == 30 and summary.loss == pytest.approx(0.2) and summary.agreement == 0.9
    assert summary.loss_error == pytest.approx(0.1 / 3**0.5) and summary.before == pytest.approx(np.e)
    assert summary.increase == pytest.approx(np.exp(0.2) - 1)
    assert '+22.14' in bench['run'].row('w4-plain', _renamed(found))


def _renamed(results):
    results.windows = {('w4-plain', text, i): window for (_, text, i), window in results.windows.items()}
    return results


def test_windows_of_texts(bench):
    texts = bench['texts']

    def encode(text: str) -> list[int]:
        return list(map(ord, text))

    text = ''.join(chr(i % 5000) for i in range(10 * texts.WINDOW))
    assert texts.windows(encode, text, 3).shape == (3, texts.WINDOW)
    assert texts.windows(encode, text, 2, spread=True)[1, 0] == 5 * texts.WINDOW % 5000
    with pytest.raises(SystemExit, match='only 10 windows'):
        texts.windows(encode, text, 11, spread=True)
    assert len(texts.library()) > 1_000_000


def test_word_classes_are_taken_off(bench, tmp_path):
    folder = tmp_path / 'x' / 'tag'
    folder.mkdir(parents=True)
    (folder / '199801.txt').write_text('迈向/v  充满/v  希望/n  的/u\n\n[中国/ns  政府/n]nt  １９９８年/t  。/w\n')
    with tarfile.open(tmp_path / 'x.tar.gz', 'w:gz') as archive:
        archive.add(folder / '199801.txt', 'x/tag/199801.txt')
    assert bench['texts'].people_daily(tmp_path / 'x.tar.gz') == '迈向充满希望的\n中国政府１９９８年。'
