"""A real embedding model against transformers on the very same files, pooled as its authors say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.encoder import EncoderExecutor
from lmdeploy.hub.resolve import resolve
from lmdeploy.tokenizer import Tokenizer

pytestmark = pytest.mark.real

TEXTS = ['The cat sat on the mat.', 'A feline rested on a rug.', 'Stock prices fell sharply today.', 'x',
         '今天天气很好', 'How do I reverse a linked list in Python?', 'word ' * 200,
         "it's [SEP] naïve, über-long-ish!?"]


@torch.no_grad()
def test_minilm_is_that_of_sentence_transformers():
    from transformers import AutoModel, AutoTokenizer

    folder = resolve('minilm', progress=False).path
    oracle, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = oracle(TEXTS, padding=True, return_tensors='pt')
    mask = batch['attention_mask'][:, :, None]
    hidden = model(**batch).last_hidden_state
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()

    tokenizer = Tokenizer(str(folder))
    executor = EncoderExecutor(EngineConfig(device='cpu', dtype='float32'), folder)
    core = EngineCore(executor, executor.start())
    for i, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        assert ids == oracle(text)['input_ids']
        core.submit(EngineInput(str(i), ids, SamplingParams(max_new_tokens=0, output_hidden='all')))
    found = {}
    while not core.idle:
        found |= {int(delta.id): np.asarray(delta.hidden)[0] for delta in core.step()}
    vectors = np.stack([found[i] for i in range(len(TEXTS))])
    assert np.abs(vectors - wanted).max() < 1e-4
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]
