"""Quantised models through the public face: they answer as their dense twins do, and false claims are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from lmdeploy.errors import ConfigError
from tests.quant.formats.folders import MODELS, write_pair
from tests.toy import write_model

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, ignore_eos=True)
PROMPTS = ['the quick brown', 'def f(x)']


@pytest.fixture(scope='module')
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp('toy') / 'dense')


def pair(toy: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Folders with the tokenizer too."""
    folders = write_pair(toy, folder, MODELS[name])
    for one in folders:
        for file in ('tokenizer.json', 'tokenizer_config.json'):
            (one / file).write_bytes((toy / file).read_bytes())
    return folders


@pytest.mark.parametrize('backend', [TurbomindEngineConfig, PytorchEngineConfig])
def test_answers_are_those_of_the_dense_twin(toy: Path, tmp_path: Path, backend: type) -> None:
    answers = []
    for folder, claim in zip(pair(toy, tmp_path, 'awq'), ('awq', 'hf')):
        with pipeline(str(folder), backend_config=backend(model_format=claim, session_len=128)) as pipe:
            answers.append([response.token_ids for response in pipe(PROMPTS, gen_config=GREEDY)])
    assert answers[0] == answers[1] and all(len(ids) == 12 for ids in answers[0])


@pytest.mark.parametrize('name', ['smooth-int8', 'fp8-block', 'w4a8', 'gptq-act'])
def test_every_kind_answers_alike_alone_and_together(toy: Path, tmp_path: Path, name: str) -> None:
    folder, _ = pair(toy, tmp_path, name)
    with pipeline(str(folder), backend_config=PytorchEngineConfig(session_len=128)) as pipe:
        together = [response.token_ids for response in pipe(PROMPTS, gen_config=GREEDY)]
        assert [pipe(prompt, gen_config=GREEDY).token_ids for prompt in PROMPTS] == together


def test_a_false_claim_is_refused(toy: Path, tmp_path: Path) -> None:
    packed, dense = pair(toy, tmp_path, 'awq')
    for folder, claim, found in ((packed, 'gptq', 'awq'), (packed, 'hf', 'awq'), (dense, 'awq', 'hf')):
        with pytest.raises(ConfigError) as caught:
            pipeline(str(folder), backend_config=TurbomindEngineConfig(model_format=claim))
        assert caught.value.code == 'LMD-229' and caught.value.params['found'] == found
