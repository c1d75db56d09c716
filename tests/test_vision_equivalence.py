"""Every way of running requests with pictures gives the same greedy tokens: transformers', 32 steps long.

One batch holds one picture, several, two of the same size under the same text, a picture that occurs twice, and none.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput, ImageSpan
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor
from tests.models.test_logits import tokens
from tests.models.tiny_vision import FAMILIES, load_vision_reference, make_vision
from tests.models.vision_driver import Prompt, VisionDriver, reference_inputs
from tests.test_equivalence import DEVICES, WAYS, run
from tests.test_tensor_parallel import Threads
from tests.vl.pictures import picture

NEW = 32
USUAL, CACHED, SCARCE = 'plain', 'prefix-cached, chunked, overlapped', 'preempted'
CASES = [pytest.param(name, CACHED, 'cpu') for name in FAMILIES if '6b' not in name and 'full' not in name]
CASES += [pytest.param(name, way, device) for name in ('internvl-chat', 'qwen2.5-vl') for way, device in
          ((USUAL, 'cpu'), (SCARCE, 'cpu'), (USUAL, 'static buffers'), (CACHED, 'static buffers'))]  # fmt: skip
CASES += [pytest.param(name, way, device, marks=pytest.mark.gpu) for name in FAMILIES for way in (USUAL, CACHED, SCARCE)
          for device in ('gpu', 'graph')]  # fmt: skip


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('vision')

    @cache
    def get(name: str) -> Path:
        return make_vision(name, root / name)

    return get


def text(seed: int, count: int) -> list[int]:
    return [token % 140 + 3 for token in tokens(seed, count)]


@cache
def prompts(folder: Path) -> tuple[list[Prompt], list[list[int]]]:
    """What is asked, and what transformers answers."""
    vision, reference = VisionDriver(folder), load_vision_reference(folder)
    shared = text(1, 66)
    asked = [
        vision.prompt(shared, picture(100, 41, 1), text(2, 7)),
        vision.prompt(shared, picture(100, 41, 2), text(2, 7)),
        vision.prompt(picture(30, 100, 3), text(3, 4), picture(150, 90, 4), text(4, 2), picture(30, 100, 3),
                      text(5, 3)),  # fmt: skip
        *(vision.prompt(text(6 + i, 45 + 5 * i)) for i in range(3)),
    ]
    answers = []
    for prompt in asked:
        with torch.inference_mode():
            out = reference.generate(**reference_inputs(vision, prompt), max_new_tokens=NEW, min_new_tokens=NEW,
                                     do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        answers.append(out[0, len(prompt.ids):].tolist())
    return asked, answers


def spans(prompt: Prompt) -> tuple[ImageSpan, ...]:
    return tuple(ImageSpan(at, at + done.layout.tokens, sha256(done.pixels.tobytes()).digest(), done.layout,
                           done.pixels) for at, done in prompt.spans)  # fmt: skip


@pytest.mark.parametrize(('name', 'way', 'device'), CASES)
def test_the_same_tokens_whatever_the_way(name, way, device, folders):
    options, depth, prefix_caching, twice = WAYS[way]
    folder = folders(name)
    asked, answers = prompts(folder)
    device, runner, record = DEVICES[device]
    longest = max(len(prompt.ids) for prompt in asked)
    blocks = -(-(longest + NEW) // 64)
    if 'num_blocks' in options:  # the longest, and little beside it
        options = options | {'num_blocks': blocks + 1}
    config = EngineConfig(**({'dtype': 'float32', 'device': device, 'runner': runner, 'session_len': 64 * blocks,
                              'max_batch_size': 8, 'num_blocks': 40} | options))
    executor = LocalExecutor(config, folder, record=record)
    core = EngineCore(executor, executor.start(), depth=depth, prefix_caching=prefix_caching)
    params = SamplingParams(max_new_tokens=NEW)
    for turn in range(2 if twice else 1):
        requests = [EngineInput(f'{turn}.{i}', prompt.ids, params, images=spans(prompt)) for i, prompt in
                    enumerate(asked)]  # fmt: skip
        found = run(core, requests)
        assert [found[request.id] for request in requests] == answers, f'turn {turn}'
    stats = core.stats()
    assert stats.used_blocks == 0
    assert (way == SCARCE) == (stats.preemptions > 0)
    assert twice == (stats.prefix_hit_tokens > 0)
    executor.stop()


@pytest.mark.parametrize('name', ['internvl-chat', 'qwen2.5-vl'])
def test_two_ranks(name, folders, tmp_path):
    folder = folders(name)
    asked, answers = prompts(folder)
    config = EngineConfig(dtype='float32', device='cpu', session_len=512, max_batch_size=8, num_blocks=40,
                          max_step_tokens=40)  # fmt: skip
    executor = Threads(config, folder, 2, tmp_path / 'meeting')
    (tmp_path / 'meeting').mkdir()
    core = EngineCore(executor, executor.start())
    requests = [EngineInput(str(i), prompt.ids, SamplingParams(max_new_tokens=NEW), images=spans(prompt))
                for i, prompt in enumerate(asked)]  # fmt: skip
    found = run(core, requests)
    assert [found[request.id] for request in requests] == answers
