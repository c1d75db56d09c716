"""Embeddings, logits and greedy tokens of vision models are transformers', for every family."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_logits import assert_close, tokens
from tests.models.tiny_vision import FAMILIES, load_vision_reference, make_vision
from tests.models.vision_driver import Prompt, VisionDriver, reference_inputs
from tests.vl.pictures import picture


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    """``family(name)`` is (our model, transformers'), made once."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = make_vision(name, tmp_path_factory.mktemp(name))
            made[name] = VisionDriver(folder), load_vision_reference(folder)
        return made[name]

    return get


def text(seed: int, count: int) -> list[int]:
    return [token % 140 + 3 for token in tokens(seed, count)]


def prompts_of(vision: VisionDriver) -> list[Prompt]:
    """One picture, several of different sizes, and none."""
    return [
        vision.prompt(text(1, 5), picture(70, 41), text(2, 7)),
        vision.prompt(picture(30, 100, 3), text(3, 4), picture(200, 90, 4), text(6, 2), picture(64, 64, 5),
                      text(4, 3)),  # fmt: skip
        vision.prompt(text(5, 9)),
    ]


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_equal_transformers(family, name):
    vision, reference = family(name)
    prompts = prompts_of(vision)
    vision.encode(prompts)
    found = vision.step([(vision.driver.row(), prompt, prompt.ids) for prompt in prompts])
    for prompt, logits in zip(prompts, found):
        with torch.inference_mode():
            wanted = reference(**reference_inputs(vision, prompt)).logits[0]
        assert_close(logits, wanted)


@pytest.mark.parametrize('name', FAMILIES)
def test_embeddings_equal_transformers(family, name):
    vision, reference = family(name)
    prompt = vision.prompt(picture(131, 77, 8), picture(40, 90, 9))
    vision.encode([prompt])
    inputs = reference_inputs(vision, prompt)
    inputs = {key: value for key, value in inputs.items() if key.startswith(('pixel', 'image'))}
    with torch.inference_mode():
        wanted = reference.model.get_image_features(**inputs).pooler_output
    wanted = torch.cat(list(wanted)) if isinstance(wanted, (list, tuple)) else wanted.flatten(0, -2)
    assert_close(prompt.embeds, wanted)


@pytest.mark.parametrize('name', FAMILIES)
def test_greedy_tokens_over_32_steps_in_chunks(family, name):
    vision, reference = family(name)
    prompts = prompts_of(vision)
    vision.encode(prompts)
    rows, fed = [vision.driver.row() for _ in prompts], [0] * len(prompts)
    last: dict[int, int] = {}
    while any(at < len(prompt.ids) for at, prompt in zip(fed, prompts)):  # chunks that end inside of pictures
        work = [i for i, prompt in enumerate(prompts) if fed[i] < len(prompt.ids)]
        outs = vision.step([(rows[i], prompts[i], prompts[i].ids[fed[i] : fed[i] + 11]) for i in work])
        for i, out in zip(work, outs):
            fed[i], last[i] = fed[i] + len(out), int(out[-1].argmax())
    answers = [[last[i]] for i in range(len(prompts))]
    for _ in range(31):
        outs = vision.step([(row, prompt, answer[-1:]) for row, prompt, answer in zip(rows, prompts, answers)])
        for answer, out in zip(answers, outs):
            answer.append(int(out[-1].argmax()))
    for prompt, answer in zip(prompts, answers):
        with torch.inference_mode():
            wanted = reference.generate(**reference_inputs(vision, prompt), max_new_tokens=32, do_sample=False,
                                        eos_token_id=None)  # fmt: skip
        assert answer == wanted[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize('name', FAMILIES)
def test_pictures_do_not_see_each_other(family, name):
    vision, _ = family(name)
    first, second = (vision.processor.process(picture(*size)) for size in ((150, 70), (60, 130)))
    together = vision.encoder([torch.from_numpy(done.pixels) for done in (first, second)])
    for done, features in zip((first, second), together):
        alone = vision.encoder([torch.from_numpy(done.pixels)])[0]
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-5)
        parts = vision.encoder([torch.from_numpy(done.pixels[i : i + 1]) for i in range(done.layout.tiles)])
        torch.testing.assert_close(torch.cat(parts), alone, atol=1e-5, rtol=1e-5)
