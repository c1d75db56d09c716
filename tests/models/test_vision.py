"""Embeddings, logits and greedy tokens of vision models are transformers', for every family."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmdeploy.config.quantization import read_quantization
from lmdeploy.models.internvl import pixel_shuffle
from lmdeploy.models.shapes import tensor_shapes
from lmdeploy.models.vision.encoder import build_encoder
from lmdeploy.nn.build import Build
from lmdeploy.parallel.group import Group
from lmdeploy.quant.formats.awq import AWQFormat
from lmdeploy.quant.rounding import round_weight
from lmdeploy.weights.checkpoint import open_checkpoint
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


@pytest.mark.parametrize('name', ['internvl', 'llava', 'llava-next', 'qwen2.5-vl'])
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (150, 1), (3, 400), (57, 56)])
def test_pictures_of_a_few_pixels(family, name, size):
    vision, reference = family(name)
    prompt = vision.prompt(text(1, 3), picture(*size), text(2, 3))
    vision.encode([prompt])
    found = vision.step([(vision.driver.row(), prompt, prompt.ids)])[0]
    with torch.inference_mode():
        wanted = reference(**reference_inputs(vision, prompt)).logits[0]
    assert_close(found, wanted)


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


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], target: Path, **config) -> Path:
    """A copy of a model with other tensors, and other fields in its config."""
    values = json.loads((folder / 'config.json').read_text()) | config
    (target / 'config.json').write_text(json.dumps(values))
    if (folder / 'preprocessor_config.json').exists():
        (target / 'preprocessor_config.json').write_text((folder / 'preprocessor_config.json').read_text())
    tensors = change(load_file(folder / 'model.safetensors'))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / 'model.safetensors')
    return target


def logits_of(vision: VisionDriver) -> list[Tensor]:
    prompts = prompts_of(vision)
    vision.encode(prompts)
    return vision.step([(vision.driver.row(), prompt, prompt.ids) for prompt in prompts])


@pytest.mark.parametrize('name', ['internvl', 'llava-next', 'qwen2.5-vl'])
def test_newer_names(family, tmp_path, name):
    """Those of transformers' own modules since its version 5."""
    vision, _ = family(name)

    def nested(tensor_name: str) -> str:
        tensor_name = tensor_name.removeprefix('language_model.')
        if tensor_name.startswith('lm_head'):
            return tensor_name
        if tensor_name.startswith('model.'):
            return tensor_name.replace('model.', 'model.language_model.', 1)
        return f'model.{tensor_name}'

    renamed = rewrite(vision.folder, lambda tensors: {nested(key): value for key, value in tensors.items()}, tmp_path)
    for found, wanted in zip(logits_of(VisionDriver(renamed)), logits_of(vision)):
        assert torch.equal(found, wanted)


def test_older_names_of_clip(family, tmp_path):
    vision, _ = family('llava')
    older = rewrite(vision.folder, lambda tensors: {
        key.replace('vision_tower.', 'vision_tower.vision_model.'): value for key, value in tensors.items()}, tmp_path)
    for found, wanted in zip(logits_of(VisionDriver(older)), logits_of(vision)):
        assert torch.equal(found, wanted)


def test_internlm2_inside(family, tmp_path):
    vision, _ = family('internvl-chat-6b')
    config = json.loads((vision.folder / 'config.json').read_text())['llm_config']
    heads, rest = config['num_key_value_heads'], {**config, 'architectures': ['InternLM2ForCausalLM']}
    dim = config['hidden_size'] // config['num_attention_heads']
    renames = {'self_attn.o_proj': 'attention.wo', 'mlp.gate_proj': 'feed_forward.w1', 'mlp.up_proj': 'feed_forward.w3',
               'mlp.down_proj': 'feed_forward.w2', 'input_layernorm': 'attention_norm', 'lm_head': 'output',
               'post_attention_layernorm': 'ffn_norm', 'embed_tokens': 'tok_embeddings'}  # fmt: skip

    def relay(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        relaid = {}
        for key, value in tensors.items():
            if '.q_proj.' in key:
                parts = (tensors[key.replace('q_proj', part)] for part in ('q_proj', 'k_proj', 'v_proj'))
                packed = torch.cat([part.view(heads, -1, dim, part.shape[-1]) for part in parts], 1)
                relaid[key.replace('self_attn.q_proj', 'attention.wqkv')] = packed.reshape(-1, packed.shape[-1])
            elif '.k_proj.' not in key and '.v_proj.' not in key:
                for old, new in renames.items() if key.startswith('language_model') else ():
                    key = key.replace(old, new)
                relaid[key] = value
        return relaid

    for found, wanted in zip(logits_of(VisionDriver(rewrite(vision.folder, relay, tmp_path, llm_config=rest))),
                             logits_of(vision)):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize('listed', [['vision_model', 'mlp1', 'lm_head'], None])
@pytest.mark.parametrize('place', ['top', 'llm_config'])
def test_a_quantised_language_model_and_a_dense_tower(family, tmp_path, listed, place):
    vision, _ = family('internvl-chat')
    values = {'quant_method': 'awq', 'bits': 4, 'group_size': 16, 'zero_point': True, 'version': 'gemm',
              'modules_to_not_convert': listed}  # fmt: skip
    storage = read_quantization({'quantization_config': {**values, 'modules_to_not_convert': None}}).storage('x')
    form = AWQFormat(storage)
    folders = tmp_path / 'codes', tmp_path / 'dense'

    def rounded(tensors: dict[str, Tensor], codes: bool) -> dict[str, Tensor]:
        changed = {}
        for key, value in tensors.items():
            layer, _, part = key.rpartition('.')
            if '.layers.' in layer and layer.startswith('language_model') and part == 'weight' and value.dim() == 2:
                bundle = round_weight(value, storage, torch.float16)
                stored = form.save(bundle) if codes else {'weight': form.dequant(bundle).float()}
                changed |= {f'{layer}.{name}': tensor for name, tensor in stored.items()}
            else:
                changed[key] = value
        return changed

    language = json.loads((vision.folder / 'config.json').read_text())['llm_config']
    config = {'quantization_config': values} if place == 'top' else {'llm_config': {
        **language, 'quantization_config': values}}
    for folder in folders:
        folder.mkdir()
    quantised = rewrite(vision.folder, lambda tensors: rounded(tensors, True), folders[0], **config)
    dense = rewrite(vision.folder, lambda tensors: rounded(tensors, False), folders[1])
    for found, wanted in zip(logits_of(VisionDriver(quantised)), logits_of(VisionDriver(dense))):
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize('name', FAMILIES)
def test_made_up_weights_have_the_names_and_shapes_of_real_ones(family, name):
    vision, _ = family(name)
    shapes = {**tensor_shapes(vision.model.spec), **vision.encoder.shapes()}
    with open_checkpoint(vision.folder) as checkpoint:
        stored = {key: tuple(checkpoint.stored(key).shape) for key in checkpoint.names()}
        unused = [key for key in stored if any(re.search(pattern, key) for pattern in vision.encoder.ignore)]
        wanted = {key: prod(shape) for key, shape in stored.items() if key not in unused}
    found = {key.replace('vision_tower.vision_model.', 'vision_tower.'): prod(shape) for key, shape in shapes.items()}
    assert found == wanted


def test_pixel_shuffle_of_both_versions():
    """The definition, value by value: which patches become one, and in what order the results lie."""
    side, merge, channels = 6, 2, 3
    x = torch.arange(2 * side * side * channels).float().view(2, side * side, channels)
    grid = x.view(2, side, side, channels)
    for transposed in (False, True):
        found = pixel_shuffle(x, merge, transposed).view(2, side // merge, side // merge, -1)
        for i in range(side // merge):
            for j in range(side // merge):
                block = grid[:, merge * i : merge * i + merge, merge * j : merge * j + merge].reshape(2, -1)
                assert torch.equal(found[:, j, i] if transposed else found[:, i, j], block)


class Pair:
    """Two ranks as threads of one process; implements :class:`lmdeploy.parallel.group.Transport`."""

    def __init__(self) -> None:
        self.barrier, self.given = threading.Barrier(2, timeout=60), {}

    def rank(self, rank: int) -> Any:
        pair = self

        class Transport:
            def all_gather(self, x: Tensor) -> Tensor:
                pair.given[rank] = x.clone()
                pair.barrier.wait()
                both = torch.stack([pair.given[0], pair.given[1]])
                pair.barrier.wait()
                return both

            def all_reduce(self, x: Tensor) -> Tensor:
                return self.all_gather(x).sum(0)

            def broadcast(self, x: Tensor, source: int) -> Tensor:
                return self.all_gather(x)[source]

        return Transport()


@pytest.mark.parametrize('name', ['internvl', 'internvl-chat-6b', 'llava', 'qwen2-vl', 'qwen2.5-vl'])
def test_two_ranks_give_what_one_gives(family, name):
    vision, _ = family(name)
    pixels = [torch.from_numpy(vision.processor.process(picture(*size)).pixels) for size in ((150, 70), (60, 130))]
    pair = Pair()

    def encode(rank: int) -> list[Tensor]:
        encoder = build_encoder(vision.config, Build(group=Group(rank, 2, pair.rank(rank), torch.device('cpu'))))
        with open_checkpoint(vision.folder) as checkpoint, torch.no_grad():
            encoder.load(checkpoint.prefix())
        return encoder(pixels)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(encode, range(2)):
            for ours, wanted in zip(found, vision.encoder(pixels)):
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
