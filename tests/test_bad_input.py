"""Bad input of every kind gives our error with its code: no traceback of a library, no hang, nothing run."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
from pathlib import Path

import pytest

from lmdeploy import ChatTemplateConfig, GenerationConfig, PytorchEngineConfig, pipeline
from lmdeploy.errors import LmdeployError
from tests.toy import write_model

SECONDS = 20  # far more than any refusal takes; a hang is a failure


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('bad_input') / 'toy')


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / 'model')
    return tmp_path / 'model'


@pytest.fixture(scope='module')
def pipe(good):
    with pipeline(str(good), PytorchEngineConfig(session_len=64, dtype='float32')) as pipe:
        yield pipe


def edit(folder: Path, file: str = 'config.json', **changes: object) -> None:
    content = json.loads((folder / file).read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    (folder / file).write_text(json.dumps(content))


def weights(folder: Path) -> Path:
    return folder / 'model.safetensors'


def edit_header(folder: Path, change) -> None:
    data = weights(folder).read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    weights(folder).write_bytes(struct.pack('<Q', len(text)) + text + data[8 + length:])


def first(header: dict) -> str:
    return next(name for name in sorted(header) if name != '__metadata__')


def only_pickles(folder: Path) -> None:
    weights(folder).rename(folder / 'pytorch_model.bin')


def truncate(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def gguf(folder: Path, content: bytes) -> Path:
    path = folder / 'x.gguf'
    path.write_bytes(content)
    return path


def link_out(folder: Path) -> None:
    target = folder.parent.parent / 'elsewhere.safetensors'
    shutil.move(weights(folder), target)
    weights(folder).unlink(missing_ok=True)
    os.symlink(target, weights(folder))


def overlap(header: dict) -> None:
    """Give the second of two tensors of one size the range of the first."""
    same = [entry for name, entry in sorted(header.items()) if entry.get('shape') == [64]]
    same[1].update(data_offsets=same[0]['data_offsets'])


# what is done to a good model folder, and the code that loading it gives
FOLDERS = {
    'no config.json': (lambda f: (f / 'config.json').unlink(), 'LMD-103'),
    'config.json is not JSON': (lambda f: (f / 'config.json').write_text('{"a": '), 'LMD-122'),
    'config.json is a list': (lambda f: (f / 'config.json').write_text('[]'), 'LMD-122'),
    'config.json is binary': (lambda f: (f / 'config.json').write_bytes(b'\xff\xfe\x00'), 'LMD-122'),
    'config.json nests deeply': (lambda f: (f / 'config.json').write_text('[' * 100000), 'LMD-122'),
    'unknown architecture': (lambda f: edit(f, architectures=['NopeForCausalLM']), 'LMD-110'),
    'architectures is null': (lambda f: edit(f, architectures=None), 'LMD-112'),
    'unknown rope type': (lambda f: edit(f, rope_parameters=..., rope_scaling={'rope_type': 'spiral', 'factor': 2.0}),
                          'LMD-111'),
    'hidden size is text': (lambda f: edit(f, hidden_size='wide'), 'LMD-113'),
    'a billion layers': (lambda f: edit(f, num_hidden_layers=10**9), 'LMD-113'),
    'minus one head': (lambda f: edit(f, num_attention_heads=-1), 'LMD-113'),
    'no vocabulary size': (lambda f: edit(f, vocab_size=...), 'LMD-112'),
    'heads that do not divide': (lambda f: edit(f, num_key_value_heads=3), 'LMD-114'),
    'wrong shape': (lambda f: edit(f, intermediate_size=100), 'LMD-133'),
    'a layer too many': (lambda f: edit(f, num_hidden_layers=3), 'LMD-132'),
    'a layer too few': (lambda f: edit(f, num_hidden_layers=1), 'LMD-134'),
    'no weights': (lambda f: weights(f).unlink(), 'LMD-120'),
    'only pickles': (only_pickles, 'LMD-108'),
    'weights truncated to a half': (lambda f: truncate(weights(f), 0.5), 'LMD-123'),
    'weights truncated to nothing': (lambda f: truncate(weights(f), 0), 'LMD-123'),
    'header longer than the file': (lambda f: weights(f).write_bytes(struct.pack('<Q', 1 << 40) + b'{}'), 'LMD-124'),
    'header is no JSON': (lambda f: weights(f).write_bytes(struct.pack('<Q', 4) + b'nope'), 'LMD-124'),
    'unknown dtype': (lambda f: edit_header(f, lambda h: h[first(h)].update(dtype='F7')), 'LMD-125'),
    'negative shape': (lambda f: edit_header(f, lambda h: h[first(h)].update(shape=[-1, 4])), 'LMD-125'),
    'huge shape': (lambda f: edit_header(f, lambda h: h[first(h)].update(shape=[1 << 40, 1 << 40])), 'LMD-125'),
    'range outside the file': (lambda f: edit_header(f, lambda h: h[first(h)].update(data_offsets=[0, 1 << 50])),
                               'LMD-125'),
    'overlapping ranges': (lambda f: edit_header(f, overlap), 'LMD-125'),
    'weights outside the folder': (link_out, 'LMD-128'),
    'index with a path': (lambda f: (f / 'model.safetensors.index.json').write_text(
        json.dumps({'metadata': {}, 'weight_map': {'a': '../x.safetensors'}})), 'LMD-128'),
    'no tokenizer': (lambda f: (f / 'tokenizer.json').unlink(), 'LMD-150'),
    'corrupt tokenizer': (lambda f: (f / 'tokenizer.json').write_text('{"version": "1.0"}'), 'LMD-151'),
    'tokenizer of another model': (lambda f: edit(f, vocab_size=16), 'LMD-153'),
    'template does not compile': (lambda f: edit(f, 'tokenizer_config.json', chat_template='{% for %}'), 'LMD-172'),
    'template escapes': (lambda f: edit(f, 'tokenizer_config.json',
                                        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"), 'LMD-173'),
    'template never ends': (lambda f: edit(f, 'tokenizer_config.json',
                                           chat_template='{% for i in range(10**9) %}x{% endfor %}'), 'LMD-173'),
    'template loops for ever': (
        lambda f: edit(f, 'tokenizer_config.json',
                       chat_template=3 * '{% for i in range(90000) %}' + 3 * '{% endfor %}'),
        'LMD-174'),
    'GGUF of nothing': (lambda f: gguf(f, b''), 'LMD-107'),
    'GGUF with a wrong magic': (lambda f: gguf(f, b'GGML' + bytes(64)), 'LMD-107'),
    'GGUF cut in the header': (lambda f: gguf(f, b'GGUF' + struct.pack('<IQQ', 3, 10, 10)), 'LMD-130'),
    'GGUF with absurd counts': (
        lambda f: gguf(f, b'GGUF' + struct.pack('<IQQ', 3, 1 << 60, 1 << 60) + bytes(64)), 'LMD-130'),
}


@pytest.mark.parametrize('case', FOLDERS)
def test_a_bad_model_is_refused(case, folder):
    spoil, code = FOLDERS[case]
    made = spoil(folder)
    path = made if isinstance(made, Path) and made.suffix == '.gguf' else folder
    start = time.monotonic()
    with pytest.raises(LmdeployError) as caught:
        pipeline(str(path), PytorchEngineConfig(session_len=64, dtype='float32'))
    assert time.monotonic() - start < SECONDS
    assert caught.value.code == code
    assert 'Traceback' not in str(caught.value)
    assert caught.value.text('zh')


@pytest.mark.parametrize(('path', 'code'), [
    ('', 'LMD-109'), ('\0', 'LMD-109'), (None, 'LMD-109'), ('pypi:', 'LMD-109'), ('ms:', 'LMD-109'),
    ('no/such/folder/here/at/all', 'LMD-102'), ('/no/such/folder', 'LMD-102'), ('../..', 'LMD-103'),
    ('/etc', 'LMD-103'), ('tmp/no/such/model', 'LMD-101'), ('smollm2:13b', 'LMD-104'), ('/dev/null', 'LMD-107'),
])
def test_a_bad_path_is_refused(path, code, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    start = time.monotonic()
    with pytest.raises(LmdeployError, match=code):
        pipeline(path)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize(('options', 'code'), [
    ({'session_len': 0}, 'LMD-222'), ({'max_batch_size': -1}, 'LMD-222'), ({'num_gpu_blocks': -1}, 'LMD-222'),
    ({'cache_max_entry_count': math.nan}, 'LMD-223'), ({'dtype': 'float7'}, 'LMD-221'), ({'block_size': 3}, 'LMD-224'),
    ({'quant_policy': 5}, 'LMD-221'), ({'session_len': 4096, 'num_gpu_blocks': 2}, 'LMD-204'),
    ({'download_dir': 5}, 'LMD-228'), ({'revision': 5}, 'LMD-109')])
def test_bad_engine_options_are_refused(options, code, good):
    with pytest.raises(LmdeployError, match=code):
        pipeline(str(good), PytorchEngineConfig(**options))


@pytest.mark.parametrize(('template', 'code'), [
    (ChatTemplateConfig('mine', stop_words=3), 'LMD-186'), (ChatTemplateConfig('mine', system=[]), 'LMD-186'),
    (ChatTemplateConfig(None), 'LMD-186'), (ChatTemplateConfig('mine', capability='fly'), 'LMD-182'),
    ('qwen', 'LMD-228'), ({'model_name': 'qwen'}, 'LMD-228')])
def test_a_bad_template_config_is_refused(template, code, good):
    with pytest.raises(LmdeployError, match=code):
        pipeline(str(good), chat_template_config=template)


@pytest.mark.parametrize('level', ['LOUD', None, 3.5])
def test_a_bad_log_level_is_refused(level, good):
    with pytest.raises(LmdeployError, match='LMD-221'):
        pipeline(str(good), log_level=level)


@pytest.mark.parametrize(('prompt', 'code'), [
    (None, 'LMD-303'),
    (3.5, 'LMD-303'),
    ([['a', 3]], 'LMD-303'),
    ([10**9], 'LMD-305'),
    ([-1], 'LMD-305'),
    (('look', 'image.png'), 'LMD-304'),
    ('word ' * 60, 'LMD-301'),
    ('x' * 10**6, 'LMD-307'),
    ('lone \ud800 surrogate', 'LMD-175'),
    ([{'role': 'user'}], 'LMD-175'),
    ([{'content': 'who?'}], 'LMD-175'),
    ([{'role': 'user', 'content': 3}], 'LMD-175'),
])
def test_a_bad_prompt_fails_alone(prompt, code, pipe):
    config = GenerationConfig(max_new_tokens=3, ignore_eos=True)
    good, bad, last = pipe(['hi', prompt, 'ho'], gen_config=config)
    assert (good.finish_reason, last.finish_reason) == ('length', 'length')
    assert bad.finish_reason == 'error'
    assert bad.error_code == code
    assert bad.error_code in bad.error_message
    assert pipe('hi', gen_config=config).token_ids == good.token_ids


def test_an_empty_raw_prompt_has_no_token_to_start_from(pipe):
    assert pipe([''], do_preprocess=False)[0].error_code == 'LMD-302'


@pytest.mark.parametrize(('config', 'code'), [
    (GenerationConfig(temperature=math.nan), 'LMD-310'), (GenerationConfig(top_p=math.inf), 'LMD-310'),
    (GenerationConfig(n=0), 'LMD-310'), ({'top_k': 3}, 'LMD-314'), ([GenerationConfig()] * 3, 'LMD-306')])
def test_bad_generation_configs_are_refused_before_anything_runs(config, code, pipe):
    with pytest.raises(LmdeployError, match=code):
        pipe(['a', 'b'], gen_config=config)


def test_code_in_a_model_folder_is_never_run(folder):
    canary = folder / 'canary'
    code = f'open({str(canary)!r}, "w").close()'
    for name in ('modeling_toy.py', 'configuration_toy.py', 'tokenization_toy.py'):
        (folder / name).write_text(code)
    (folder / 'training_args.bin').write_bytes(b'cbuiltins\nexec\n(V' + code.encode() + b'\ntR.')
    edit(folder, auto_map={'AutoConfig': 'configuration_toy.ToyConfig', 'AutoModelForCausalLM': 'modeling_toy.Toy'})
    edit(folder, 'tokenizer_config.json', auto_map={'AutoTokenizer': ['tokenization_toy.ToyTokenizer', None]})
    with pipeline(str(folder), PytorchEngineConfig(session_len=64), trust_remote_code=True) as pipe:
        assert pipe('hi', gen_config=GenerationConfig(max_new_tokens=2, ignore_eos=True)).generate_token_len == 2
    assert not canary.exists()
