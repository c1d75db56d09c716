"""``/v1/embeddings`` of an encoder: vectors as sentence-transformers makes them, and every other route a clear 400."""

from __future__ import annotations

import asyncio
import base64

import httpx
import numpy as np
import openai
import pytest
import torch

import lmdeploy
from lmdeploy.chat import ChatTemplateConfig, resolve_template
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.core import EngineCore
from lmdeploy.errors import ConfigError
from lmdeploy.executor.encoder import EncoderExecutor
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.serve.context import LoadedEngine, ServerContext
from lmdeploy.serve.openai.api_server import create_app
from lmdeploy.tokenizer import Tokenizer
from tests.serve.fake_server import Server
from tests.serve.test_edge import shape
from tests.serve.test_tutorial import api_server
from tests.toy_encoder import write_encoder, write_modules

TEXTS = ['the quick fox', 'Time management!', 'jumps over the lazy dog, one two three', 'x']
URL = '/v1/embeddings'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = write_encoder(tmp_path_factory.mktemp('encoder') / 'toy')
    write_modules(folder, 'Transformer', 'Pooling', 'Normalize', most=24)
    return folder


@pytest.fixture(scope='module')
def server(folder):
    executor = EncoderExecutor(EngineConfig(device='cpu'), folder)
    client = ThreadClient(lambda: EngineCore(executor, executor.start()))
    tokenizer = Tokenizer(str(folder))
    frontend = AsyncFrontend(client, tokenizer, resolve_template(str(folder), tokenizer, ChatTemplateConfig('base')),
                             client.capacity, executor.context_len)
    context = ServerContext(model_names=('toy',), engine=LoadedEngine(frontend))
    yield Server(context, create_app(context), frontend, client, executor)
    client.close()
    context.metrics.check()


@pytest.fixture(scope='module')
def wanted(folder) -> np.ndarray:
    """Mean pooling with the mask over a padded batch, then length 1."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        hidden = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).last_hidden_state
    mask = batch['attention_mask'][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()


def read(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = answer.json()['data']
    assert [row['index'] for row in data] == list(range(len(data)))
    return np.array([row['embedding'] for row in data], np.float32)


def test_vectors_are_those_of_sentence_transformers(server, wanted):
    answer = server.post(URL, {'model': 'toy', 'input': TEXTS})
    assert np.allclose(read(answer), wanted, atol=1e-4)
    usage = answer.json()['usage']
    counts = [len(server.frontend.tokenizer.encode(text)) for text in TEXTS]
    assert usage == {'prompt_tokens': sum(counts), 'total_tokens': sum(counts)}
    for text, vector in zip(TEXTS, wanted):
        assert np.allclose(read(server.post(URL, {'model': 'toy', 'input': text}))[0], vector, atol=1e-4)


def test_tokens_base64_and_dimensions(server, wanted):
    ids = [server.frontend.tokenizer.encode(text) for text in TEXTS]
    assert np.allclose(read(server.post(URL, {'model': 'toy', 'input': ids})), wanted, atol=1e-4)
    coded = server.post(URL, {'model': 'toy', 'input': TEXTS, 'encoding_format': 'base64'}).json()['data']
    assert np.allclose([np.frombuffer(base64.b64decode(row['embedding']), '<f4') for row in coded], wanted, atol=1e-4)
    cut = wanted[:, :5] / np.linalg.norm(wanted[:, :5], axis=1, keepdims=True)
    assert np.allclose(read(server.post(URL, {'model': 'toy', 'input': TEXTS, 'dimensions': 5})), cut, atol=1e-4)
    shape(server.post(URL, {'model': 'toy', 'input': 'x', 'dimensions': 33}), 400, 'invalid_request')


def test_a_text_is_never_cut(server):
    fits = 'x ' * 22
    assert len(server.frontend.tokenizer.encode(fits)) == 24
    read(server.post(URL, {'model': 'toy', 'input': fits}))
    told = shape(server.post(URL, {'model': 'toy', 'input': ['x', fits + 'x']}), 400, 'context_length_exceeded')
    assert '25' in told['message'] and '24' in told['message'] and '40' in told['message']
    shape(server.post(URL, {'model': 'toy', 'input': 'x' * 10000}), 400, 'context_length_exceeded')
    shape(server.post(URL, {'model': 'toy', 'input': [[10**6]]}), 400, 'invalid_request')
    assert server.settled()


def test_requests_share_steps_and_leave_nothing(server, wanted):
    before = server.client.stats()

    async def many() -> list[np.ndarray]:
        async with server.http(timeout=60) as http:
            found = await asyncio.gather(*(http.post(URL, json={'model': 'toy', 'input': TEXTS}) for _ in range(30)))
        return [read(answer) for answer in found]

    for rows in asyncio.run(many()):
        assert np.allclose(rows, wanted, atol=1e-4)
    after = server.client.stats()
    assert after.finished - before.finished == 120 and after.steps - before.steps < 100
    assert server.settled()


@pytest.mark.parametrize('path, body', [
    ('/v1/chat/completions', {'model': 'toy', 'messages': [{'role': 'user', 'content': 'hi'}]}),
    ('/v1/chat/completions', {'model': 'toy', 'messages': [{'role': 'user', 'content': 'hi'}], 'stream': True}),
    ('/v1/completions', {'model': 'toy', 'prompt': 'hi'}),
    ('/v1/chat/interactive', {'prompt': 'hi'}),
    ('/generate', {'prompt': 'hi'}),
    ('/generate', {'input_ids': [5]}),
])
def test_it_writes_no_text(server, path, body):
    told = shape(server.post(path, body), 400, 'unsupported_feature')
    assert '/v1/embeddings' in told['message'] and told['error']['lmdeploy_code'] == 'LMD-308'
    assert server.settled()


def test_its_tokens_can_be_looked_at(server):
    told = server.post('/tokenize', {'prompt': TEXTS[0]}).json()
    assert told['tokens'] == server.frontend.tokenizer.encode(TEXTS[0]) and told['max_model_len'] == 24
    assert server.ask('GET', '/v1/models').json()['data'][0]['max_model_len'] == 24


def test_the_server_of_an_embedding_model_and_no_pipeline_of_it(folder, tmp_path, wanted):
    with pytest.raises(ConfigError) as caught:
        lmdeploy.pipeline(str(folder))
    assert caught.value.code == 'LMD-119'
    with api_server(str(folder), tmp_path, '--model-name', 'toy', '--no-ui') as running:
        shape(httpx.get(f'http://127.0.0.1:{running.port}/'), 404, 'not_found')
        client = openai.OpenAI(api_key='none', base_url=f'http://127.0.0.1:{running.port}/v1', max_retries=0)
        rows = client.embeddings.create(model='toy', input=TEXTS).data
        assert np.allclose([row.embedding for row in rows], wanted, atol=1e-4)
        with pytest.raises(openai.BadRequestError, match='embeddings'):
            client.chat.completions.create(model='toy', messages=[{'role': 'user', 'content': 'hi'}])
