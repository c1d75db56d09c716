"""A language model in a GGUF file and a vision part in the folder beside it are one vision model."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.model import ModelConfig
from lmdeploy.config.vision import read_vision, vision_model
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput, ImageSpan
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.models.vision.encoder import build_encoder
from lmdeploy.nn.build import Build
from lmdeploy.vl.processor import build_processor
from lmdeploy.vl.prompt import digest
from lmdeploy.weights.checkpoint import open_checkpoint
from tests.toy_vision import TOWER, picture
from tests.weights.files import HIDDEN, write_gguf

CONFIG = {'architectures': ['InternVLChatModel'], 'vision_config': TOWER, 'downsample_ratio': 0.5, 'ps_version': 'v2',
          'llm_config': {'architectures': ['LlamaForCausalLM'], 'hidden_size': HIDDEN}}  # fmt: skip


def write_part(folder):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = build_encoder(read_vision(CONFIG), Build(torch.float32)).shapes()
    save_file({name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()},
              folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(CONFIG))


def test_both_parts_are_one_checkpoint(tmp_path):
    path = tmp_path / 'x.Q8_0.gguf'
    wanted = write_gguf(path)
    assert vision_model(path) is None
    with open_checkpoint(path) as checkpoint:
        alone = checkpoint.config
    write_part(tmp_path / 'x.Q8_0.vision')
    assert vision_model(path).hidden_size == HIDDEN
    with open_checkpoint(path) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        assert (config.architecture, config.wrapper) == ('LlamaForCausalLM', 'InternVLChatModel')
        assert checkpoint.config['llm_config'] == alone
        for name, value in wanted.items():
            assert np.array_equal(checkpoint.get(f'language_model.{name}').numpy(), value)
        assert any(name.startswith('vision_model.') for name in checkpoint.names())


def test_the_engine_reads_pictures_with_it(tmp_path):
    path = tmp_path / 'x.gguf'
    write_gguf(path)
    write_part(tmp_path / 'x.vision')
    executor = LocalExecutor(EngineConfig(device='cpu', dtype='float32', session_len=64), path)
    core = EngineCore(executor, executor.start())
    processor, answers = build_processor(vision_model(path)), []
    for seed in (1, 2):
        done = processor.process(picture(seed=seed))
        span = ImageSpan(1, 1 + done.layout.tokens, digest(done.pixels, done.layout), done.layout, done.pixels)
        core.submit(EngineInput(f'{seed}', [3] + [0] * done.layout.tokens + [4],
                                SamplingParams(max_new_tokens=1, output_logits='generation'), images=(span,)))
        while not core.idle:
            answers += [delta.logits for delta in core.step() if delta.logits is not None]
    assert len(answers) == 2 and not torch.allclose(*answers, atol=1e-3)
    executor.stop()
