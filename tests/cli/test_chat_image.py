"""``lmdeploy chat --image`` and a server's engine process, with a tiny vision model."""

from __future__ import annotations

import asyncio

import pytest

from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from lmdeploy.cli.entrypoint import main
from lmdeploy.config.options import normalise
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.serve.remote import ProcessEngine
from tests.toy_vision import picture, write_vision_model

CPU = PytorchEngineConfig(device_type='cpu', dtype='float32')
SHORT = GenerationConfig(max_new_tokens=6)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_vision_model(tmp_path_factory.mktemp('toy') / 'InternVL3-tiny')


@pytest.fixture
def shown(tmp_path):
    picture(90, 60, 3).save(tmp_path / 'picture.png')
    return str(tmp_path / 'picture.png')


def test_the_terminal_asks_about_a_picture(folder, shown, capsys):
    argv = ['chat', str(folder), '-q', 'what?', '--image', shown, '--device', 'cpu', '--dtype', 'float32',
            '--top-k', '1', '--temperature', '0', '--repetition-penalty', '1', '--max-new-tokens', '6']
    assert main(argv) == 0
    said = capsys.readouterr().out.rstrip('\n')
    with pipeline(str(folder), CPU) as pipe:
        assert said == pipe(('what?', shown), gen_config=SHORT).text.rstrip('\n')


def test_a_picture_that_is_none_is_told_before_the_model_loads(capsys):
    assert main(['chat', '/no/such/model', '-q', 'x', '--image', '/no/such.png']) == 1
    assert 'error LMD-665' in capsys.readouterr().err


def test_pictures_reach_the_engine_of_a_server(folder):
    """Two forms of one question: by the pipeline, and by an engine in a process of its own."""
    prompts = [Prompt(messages=[{'role': 'user', 'content': [
        {'type': 'image', 'image': picture(90, 60, seed)}, {'type': 'text', 'text': 'what?'}]}]) for seed in (3, 4)]
    gen = GenerationConfig(max_new_tokens=2, output_logits='generation', n=2)

    async def answers(frontend):
        found = []
        for prompt in prompts:
            found.append([o async for o in frontend.generate(prompt, gen) if o.finish_reason])
        return found

    async def there():
        engine = ProcessEngine(normalise(CPU), folder)
        try:
            await engine.load()
            return await answers(engine.frontend)
        finally:
            await engine.close()

    theirs = asyncio.run(asyncio.wait_for(there(), 120))
    with pipeline(str(folder), CPU) as pipe:
        ours = asyncio.run(answers(pipe.frontend))
    for mine, other in zip(ours, theirs):
        assert [o.error for o in other] == [None, None]
        assert abs(mine[0].logits.numpy() - other[0].logits).max() < 1e-4
    assert abs(theirs[0][0].logits - theirs[1][0].logits).max() > 1e-3
