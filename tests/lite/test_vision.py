"""Of a vision model the language model is quantised; the rest is copied, and the whole loads and reads pictures."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.lite.runs import RECIPES, options, run
from tests.models.vision_driver import VisionDriver
from tests.toy_vision import picture, write_vision_model


def logits(folder, shown) -> torch.Tensor:
    vision = VisionDriver(folder)
    prompt = vision.prompt([5, 6, 7], shown, list(range(20, 60)))
    vision.encode([prompt])
    return vision.step([(vision.driver.row(), prompt, prompt.ids)])[0]


@pytest.mark.parametrize('name', ['awq', 'int8'])
def test_the_tower_is_copied(name, tmp_path, text):
    model = write_vision_model(tmp_path / 'model', head_dim=16)
    run(model, RECIPES[name](), options(tmp_path / 'out', text, calib_samples=2))
    before = load_file(model / 'model.safetensors')
    after = {key: value for file in (tmp_path / 'out').glob('*.safetensors') for key, value in load_file(file).items()}
    kept = [key for key in before if not key.startswith('language_model.')]
    assert kept and all(torch.equal(before[key], after[key]) for key in kept)
    assert any(key.endswith(('qweight', 'weight_scale', 'scale')) for key in after)
    found, wanted, other = (logits(folder, picture(64, 64, seed)) for folder, seed in (
        (tmp_path / 'out', 0), (model, 0), (model, 1)))  # fmt: skip

    def alike(one: torch.Tensor, two: torch.Tensor) -> float:
        return torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), 0).item()

    assert alike(found, wanted) > 0.98 > alike(other, wanted)
