"""An encoder as an executor: what it says of itself, which options it refuses, and vectors as the folder says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lmdeploy.config.encoder import Pooling
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import ConfigError, LmdeployError
from lmdeploy.executor.encoder import EncoderExecutor
from tests.toy_encoder import write_encoder, write_modules

TEXTS = [[2, 7, 8, 3], [2, 3], [2, *range(5, 35), 3], [2, 9, 3]]


def vectors(folder, **options) -> np.ndarray:
    executor = EncoderExecutor(EngineConfig(device='cpu', **options), folder)
    core = EngineCore(executor, executor.start())
    for i, tokens in enumerate(TEXTS):
        core.submit(EngineInput(str(i), tokens, SamplingParams(max_new_tokens=0, output_hidden='all')))
    found = {}
    while not core.idle:
        found |= {int(delta.id): np.asarray(delta.hidden)[0] for delta in core.step()}
    executor.stop()
    executor.stop()
    return np.stack([found[i] for i in range(len(TEXTS))])


@torch.no_grad()
def oracle(folder) -> list[torch.Tensor]:
    import transformers

    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return [model(torch.tensor([tokens])).last_hidden_state[0] for tokens in TEXTS]


@pytest.mark.parametrize('names, mode', [((), 'mean_tokens'), (('Transformer', 'Pooling'), 'mean_tokens'),
                                         (('Transformer', 'Pooling', 'Normalize'), 'cls_token'),
                                         (('Transformer', 'Pooling'), 'max_tokens')])
def test_vectors_are_pooled_as_the_folder_says(tmp_path, names, mode):
    folder = write_encoder(tmp_path / 'model')
    if names:
        write_modules(folder, *names, mode=mode)
    found = vectors(folder)
    for mine, rows in zip(found, oracle(folder)):
        wanted = {'mean_tokens': rows.mean(0), 'cls_token': rows[0], 'max_tokens': rows.max(0).values}[mode]
        if not names or 'Normalize' in names:
            wanted = wanted / wanted.norm()
        assert np.allclose(mine, wanted.numpy(), atol=1e-4, rtol=1e-4)
    one_by_one = vectors(folder, max_batch_size=1)
    assert np.allclose(one_by_one, found, atol=1e-5, rtol=1e-5)


def test_it_tells_what_it_holds(tmp_path):
    folder = write_encoder(tmp_path / 'model')
    capacity = EncoderExecutor(EngineConfig(device='cpu'), folder).start()
    assert (capacity.session_len, capacity.num_blocks, capacity.pooling) == (40, 0, Pooling())
    write_modules(folder, 'Transformer', 'Pooling', most=16)
    capacity = EncoderExecutor(EngineConfig(device='cpu'), folder).start()
    assert (capacity.session_len, capacity.pooling) == (16, Pooling('mean', False, 16))
    assert capacity.choices['dtype'] == 'float32' and capacity.choices['pooling'] == 'mean'
    assert EncoderExecutor(EngineConfig(device='cpu', session_len=40), folder).start().session_len == 40
    with pytest.raises(ConfigError) as caught:
        EncoderExecutor(EngineConfig(device='cpu', session_len=41), folder).start()
    assert caught.value.code == 'LMD-209' and '40' in str(caught.value)


@pytest.mark.parametrize('name, text, code', [
    ('modules.json', '{', 'LMD-122'), ('modules.json', '{}', 'LMD-122'), ('modules.json', '[1]', 'LMD-122'),
    ('modules.json', json.dumps([{'type': 'x.Pooling', 'path': '../other'}]), 'LMD-122'),
    ('modules.json', json.dumps([{'type': 'x.Pooling', 'path': '..'}]), 'LMD-122'),
    ('modules.json', json.dumps([{'type': 'x.Dense'}]), 'LMD-115'),
    ('sentence_bert_config.json', '{"max_seq_length": "many"}', 'LMD-113'),
])
def test_damaged_pooling_files_are_refused_before_a_weight_is_read(tmp_path, name, text, code):
    folder = write_encoder(tmp_path / 'model')
    (folder / name).write_text(text)
    with pytest.raises(LmdeployError) as caught:
        EncoderExecutor(EngineConfig(device='cpu'), folder).start()
    assert caught.value.code == code
