"""Every recipe end to end: what is written is what was measured, and the engine computes it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lmdeploy.config.quantization import read_quantization
from lmdeploy.lite.job import Job
from lmdeploy.lite.output import placed
from tests.lite.runs import RECIPES, options, run
from tests.models.driver import Driver, load_model
from tests.models.tiny import make_tiny

TOLERANCE = {'w2': 0.02, 'w3': 0.02, 'w4a8': 0.03}  # of a loss in nats: 8-bit inputs are rounded after other sums


@pytest.mark.parametrize('name', RECIPES)
def test_the_engine_gives_the_loss_that_the_report_tells(toy, text, tmp_path, name):
    out = tmp_path / 'out'
    job = Job.open(toy, RECIPES[name](), options(out, text, eval_tokens=40))
    report = job.run(lambda event: None)
    model = load_model(out)
    for (_, judged), quality in zip(job.judged, report.quality, strict=True):
        losses = []
        for ids in judged.sequences:
            logits = Driver(model).sequence(ids.tolist())[:-1].log_softmax(-1)
            losses.append(-logits.gather(1, ids[1:, None]).flatten())
        assert math.log(quality.after) == pytest.approx(float(torch.cat(losses).mean()), abs=TOLERANCE.get(name, 0.01))
    assert report.layers and all(site.loss < 1 for layer in report.layers for site in layer.sites.values())
    config = json.loads((out / 'config.json').read_text())
    quantization = read_quantization(config)
    for layer, storage in placed(job.source, job.recipe).items():
        assert quantization.storage(layer) == storage
    assert quantization.storage('lm_head') is None
    job.close()


def test_weights_that_are_left_alone_change_nothing(toy, text, tmp_path):
    """The control: a recipe that stores everything dense differs from the model by exactly 0."""
    from lmdeploy.lite.awq import AWQ
    from tests.lite.runs import W4

    class Nothing(AWQ):
        def storage(self, layer, site):
            return None

    source_like = tmp_path / 'bf16'
    make_bf16(toy, source_like)
    job = Job.open(source_like, Nothing(W4), options(tmp_path / 'out', text, eval_tokens=40))
    from lmdeploy.lite.driver import Driver as Layerwise
    from lmdeploy.lite.workdir import WorkDir

    work = WorkDir.open(tmp_path / 'out', job.key)
    streams = job._streams(work)
    Layerwise(job.source, job.recipe, work, streams, job.device).run()
    for quality in job._judge(work, streams.held_out_float, streams.held_out):
        assert quality.before == quality.after
        assert quality.kl == 0.0 and quality.agreement == 1.0
    job.close()


def make_bf16(folder, out):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    copytree(folder, out)
    tensors = load_file(out / 'model.safetensors')
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, out / 'model.safetensors')
    config = json.loads((out / 'config.json').read_text())
    config.pop('torch_dtype', None)
    (out / 'config.json').write_text(json.dumps(config | {'dtype': 'bfloat16'}))


@pytest.mark.parametrize('arch', ['InternLM2ForCausalLM', 'Gemma3ForCausalLM', 'Qwen3ForCausalLM'])
def test_other_layouts_of_layers(toy, text, tmp_path, arch):
    """Packed projections, norms around both halves and stored as differences, norms of heads; sizes that 16 divides."""
    from shutil import copyfile

    from lmdeploy.config.quantization import AWQ, Storage
    from lmdeploy.lite.awq import AWQ as Recipe

    folder = make_tiny(arch, tmp_path / 'model', vocab_size=320, hidden_size=64, intermediate_size=96,
                       num_attention_heads=4, eos_token_id=2)  # fmt: skip
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        copyfile(toy / name, folder / name)
    out = tmp_path / 'out'
    job = Job.open(folder, Recipe(Storage(AWQ, bits=4, group=16, symmetric=False)), options(out, text, eval_tokens=40))
    report = job.run(lambda event: None)
    model = load_model(out)
    ids = job.judged[0][1].sequences[0]
    logits = Driver(model).sequence(ids.tolist())[:-1].log_softmax(-1)
    loss = float(-logits.gather(1, ids[1:, None]).mean())
    assert math.log(report.quality[0].after) == pytest.approx(loss, abs=0.02)
    job.close()


def test_equal_runs_give_equal_bytes_and_a_finished_one_is_found(toy, text, tmp_path):
    from tests.lite.runs import digests

    first = run(toy, RECIPES['awq'](), options(tmp_path / 'a', text))
    run(toy, RECIPES['awq'](), options(tmp_path / 'b', text))
    assert digests(tmp_path / 'a') == digests(tmp_path / 'b')
    job = Job.open(toy, RECIPES['awq'](), options(tmp_path / 'a', text))
    found = job.finished()
    assert found is not None and found.key == first.key
    assert [layer.sites.keys() for layer in found.layers] == [layer.sites.keys() for layer in first.layers]
    job.close()
