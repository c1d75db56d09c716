"""Calibration texts: where they come from, what replaces them, and how windows are cut."""

from __future__ import annotations

import json

import pytest
import torch

from lmdeploy.chat import resolve_template
from lmdeploy.errors import ConfigError
from lmdeploy.lite import corpora
from lmdeploy.lite.calibration import Sampler
from lmdeploy.lite.corpora import Corpus, bundled, held_out, load_corpus
from lmdeploy.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def sampler(toy):
    tokenizer = Tokenizer(str(toy))
    return Sampler(tokenizer, resolve_template(str(toy), tokenizer))


def test_named_texts_are_replaced_by_name_where_there_is_no_network():
    for name in ('wikitext2', 'c4', 'pileval', 'ptb', 'mix'):
        found = load_corpus(name)
        assert found.name == 'bundled' and 'no network' in found.replaced
        assert [part.name for part in found.parts] == ['bundled en', 'bundled zh', 'bundled code']


def test_ptb_stands_in_for_a_text_of_the_hub(monkeypatch):
    monkeypatch.setattr(corpora, 'treebank', lambda part: ['a sentence', 'another'])
    assert [part.name for part in load_corpus('mix').parts] == ['ptb', 'bundled en', 'bundled zh', 'bundled code']
    assert load_corpus('ptb').documents == ['a sentence', 'another'] and not load_corpus('ptb').replaced
    found = load_corpus('c4')
    assert found.name == 'ptb' and found.replaced.startswith('c4: ')


def test_held_out_texts_are_no_calibration_texts():
    judged = held_out()
    assert list(judged) == ['en', 'zh', 'code']
    for language in ('en', 'zh'):
        assert not set(bundled(f'held_out_{language}')) & set(bundled(f'calibration_{language}'))
    code = next(part for part in load_corpus('bundled').parts if part.name == 'bundled code')
    assert not set(judged['code'].documents) & set(code.documents)


@pytest.mark.parametrize(('entry', 'wanted'), [
    ('plain', 'plain'),
    ({'text': 'plain'}, 'plain'),
    ({'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]},
     [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]),
    ({'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]},
     [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]),
    ({'instruction': 'a', 'input': 'b', 'output': 'c'},
     [{'role': 'user', 'content': 'a\nb'}, {'role': 'assistant', 'content': 'c'}]),
    ({'prompt': 'a'}, [{'role': 'user', 'content': 'a'}]),
])  # fmt: skip
def test_lines_of_json(tmp_path, entry, wanted):
    path = tmp_path / 'x.jsonl'
    path.write_text(json.dumps(entry) + '\n\n')
    assert load_corpus(str(path)).documents == [wanted]
    path = tmp_path / 'x.json'
    path.write_text(json.dumps([entry]))
    assert load_corpus(str(path)).documents == [wanted]


def test_a_folder_of_files(tmp_path):
    (tmp_path / 'a.txt').write_text('one')
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'deep' / 'b.py').write_text('two')
    (tmp_path / 'c.bin').write_bytes(b'\xff')
    assert load_corpus(str(tmp_path)).documents == ['one', 'two']


@pytest.mark.parametrize('content', ['{', '{"a": 1}', '[1]', '{"messages": [{"role": "x"}]}'])
def test_files_that_cannot_be_used(tmp_path, content):
    path = tmp_path / 'x.jsonl'
    path.write_text(content)
    with pytest.raises(ConfigError, match='LMD-607'):
        load_corpus(str(path))
    path.write_bytes(b'\xff\xfe')
    with pytest.raises(ConfigError, match='LMD-607'):
        load_corpus(str(path))
    with pytest.raises(ConfigError, match='LMD-607'):
        load_corpus(str(tmp_path / 'empty') if (tmp_path / 'empty').mkdir() is None else '')


def test_a_name_that_nobody_knows():
    with pytest.raises(ConfigError, match='LMD-608'):
        load_corpus('no-such-text')


def test_windows_are_whole_different_and_the_same_again(sampler):
    corpus = Corpus('x', [f'line number {i} of a text' for i in range(200)])
    first, second = sampler.sample(corpus, 8, 32), sampler.sample(corpus, 8, 32)
    assert first.digest == second.digest != sampler.sample(corpus, 8, 32, seed=1).digest
    assert [len(ids) for ids in first.sequences] == [32] * 8
    assert len({tuple(ids.tolist()) for ids in first.sequences}) == 8


def test_every_part_is_in_the_mix(sampler):
    parts = [Corpus('a', ['a'] * 400), Corpus('b', ['b'] * 400)]
    found = sampler.sample(Corpus('mix', [], parts=parts), 4, 20)
    texts = sorted(sampler.tokenizer.decode(ids.tolist()).replace('\n', '')[0] for ids in found.sequences)
    assert texts == ['a', 'a', 'b', 'b']


def test_short_texts_give_what_they_have(sampler):
    found = sampler.sample(Corpus('x', ['the quick brown fox jumps over the lazy dog'] * 3), 5, 1000)
    assert 0 < found.tokens < 1000
    with pytest.raises(ConfigError, match='LMD-609'):
        sampler.sample(Corpus('x', ['a']), 5, 1000)


def test_control_tokens_come_from_the_template_alone(sampler):
    spelled = 'x<|im_end|>'
    control = sampler.tokenizer.special_tokens['<|im_end|>']
    assert control not in sampler.encode(spelled, False)
    ids = sampler.encode([{'role': 'user', 'content': spelled}, {'role': 'assistant', 'content': 'y'}], False)
    assert ids.count(control) == 1


def test_statistics_refuse_what_is_not_finite():
    from lmdeploy.errors import LoadError
    from lmdeploy.lite.statistics import Gatherer

    gatherer = Gatherer('model.layers.3 (down)', 4, 8, frozenset(), torch.device('cpu'))
    with pytest.raises(LoadError, match=r'LMD-602.*layers\.3.*channel 2'):
        gatherer.add(torch.tensor([[0.0, 1.0, float('nan'), 2.0]]))
