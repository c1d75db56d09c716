"""Vision models in the engine: greedy tokens equal transformers', however prompts are cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.plan import Encode, Place, StepPlan
from lmdeploy.engine.request import EngineInput, ImageSpan
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.runner.encoder import PictureEncoder
from lmdeploy.runner.graphs import rerun
from lmdeploy.vl.prompt import digest
from tests.models.tiny_vision import load_vision_reference, make_vision
from tests.models.vision_driver import Prompt, VisionDriver, reference_inputs
from tests.vl.pictures import picture

STEPS = 32
WAYS = {
    'at once': (EngineConfig(), None),
    'in chunks, with a prefix cache': (EngineConfig(max_step_tokens=23, prefix_caching=True, max_pictures=1), None),
    'few blocks': (EngineConfig(num_blocks=9, session_len=500, max_step_tokens=100), None),
    'graphs': (EngineConfig(runner='graph'), rerun),
    'graphs and chunks': (EngineConfig(runner='graph', max_step_tokens=40), rerun),
}  # fmt: skip


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    """``family(name)`` is (folder, requests, transformers' answers), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = make_vision(name, tmp_path_factory.mktemp(name))
            driver, reference = VisionDriver(folder), load_vision_reference(folder)
            prompts = [driver.prompt([5, 6, 7], picture(70, 41), [8, 9]),
                       driver.prompt(picture(30, 100, 3), [11, 12], picture(120, 60, 4), [13]),
                       driver.prompt([21, 22, 23, 24, 25]), driver.prompt([31], picture(64, 64, 5), [32]),
                       driver.prompt([5, 6, 7], picture(70, 41, 9), [8, 9])]  # fmt: skip
            made[name] = folder, prompts, [answer(driver, reference, prompt) for prompt in prompts]
        return made[name]

    return get


def answer(driver, reference, prompt):
    with torch.inference_mode():
        ids = reference.generate(**reference_inputs(driver, prompt), max_new_tokens=STEPS, do_sample=False,
                                 eos_token_id=None)  # fmt: skip
    return ids[0, len(prompt.ids):].tolist()


def request(name: str, prompt: Prompt) -> EngineInput:
    spans = tuple(ImageSpan(at, at + done.layout.tokens, digest(done.pixels, done.layout), done.layout, done.pixels)
                  for at, done in prompt.spans)
    return EngineInput(name, prompt.ids, SamplingParams(max_new_tokens=STEPS), images=spans)


def serve(core, requests):
    found = {request.id: [] for request in requests}
    for request in requests:
        core.submit(request)
    while not core.idle:
        for delta in core.step():
            assert delta.finish is None or delta.finish.error is None, delta.finish
            found[delta.id] += delta.tokens
        core.check()
    return list(found.values())


@pytest.mark.parametrize('name', ['internvl-chat', 'llava-next', 'qwen2.5-vl'])
def test_greedy_tokens_equal_transformers_in_every_way(family, name):
    folder, prompts, wanted = family(name)
    for config, record in WAYS.values():
        config = replace(config, dtype='float32', device='cpu', session_len=config.session_len or 600)
        executor = LocalExecutor(config, folder, record=record)
        core = EngineCore(executor, executor.start(), depth=2, prefix_caching=config.prefix_caching)
        assert serve(core, [request(f'{i}', prompt) for i, prompt in enumerate(prompts)]) == wanted
        again = [request(f'again {i}', prompt) for i, prompt in enumerate(prompts)]
        assert serve(core, again) == wanted
        if config.prefix_caching and max(len(prompt.ids) for prompt in prompts) > 64:
            assert core.stats().prefix_hit_tokens
        executor.stop()


class Encoder:
    """Every tile is four features of its first byte; memory runs out where it is 13."""

    class build:
        device, dtype = torch.device('cpu'), torch.float32

    def __init__(self):
        self.calls = 0

    def __call__(self, pixels):
        self.calls += 1
        if any((part[:, 0, 0, 0] == 13).any() for part in pixels):
            raise MemoryError('thirteen')
        return [part[:, 0, 0, 0].float().repeat_interleave(4)[:, None] for part in pixels]

    def join(self, features, layout):
        return features


def plan_of(encode=(), places=(), forget=()):
    none = np.zeros(0, np.int32)
    return StepPlan(1, none, none, np.zeros(1, np.int32), none, np.zeros(1, np.int32), none, none.astype(np.uint8),
                    none.astype(bool), none, encode=tuple(encode), places=tuple(places), forget=tuple(forget))


def tiles(name, values, first=0, total=None):
    from lmdeploy.config.vision import Layout

    count = total or len(values)
    pixels = np.array(values, np.uint8).reshape(-1, 1, 1, 1).repeat(3, 1)
    return Encode(name, first, pixels, Layout((1, 1), (1, count), count, 4 * count, count))


def test_embeddings_come_from_their_picture_and_offset():
    pictures = PictureEncoder(Encoder())
    pictures.run(plan_of([tiles(b'a', [1, 2]), tiles(b'b', [7], 0, 2)]))
    pictures.run(plan_of([tiles(b'b', [8], 1, 2)]))
    assert pictures.encoder.calls == 2
    embeds = pictures.embeds([Place(3, 2, b'a', 3), Place(9, 4, b'b', 2)])
    assert embeds.rows.tolist() == [3, 4, 9, 10, 11, 12]
    assert embeds.values[:, 0].tolist() == [1, 2, 7, 7, 8, 8]
    pictures.run(plan_of(forget=[b'a', b'unknown']))
    with pytest.raises(MemoryError):
        pictures.embeds([Place(0, 1, b'a', 0)])


def test_a_picture_that_was_lost_is_nowhere():
    pictures = PictureEncoder(Encoder())
    pictures.run(plan_of([tiles(b'a', [1], 0, 2)]))
    plan = plan_of([tiles(b'a', [13], 1, 2)])
    with pytest.raises(MemoryError):
        pictures.run(plan)
    pictures.lose(plan)
    with pytest.raises(MemoryError):
        pictures.embeds([Place(0, 1, b'a', 0)])
    pictures.run(plan_of([tiles(b'a', [1, 2])]))
    assert pictures.embeds([Place(0, 8, b'a', 0)]).values[:, 0].tolist() == [1] * 4 + [2] * 4
