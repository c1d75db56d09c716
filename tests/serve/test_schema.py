"""Every operation of our own OpenAPI description, with bodies that fit it and bodies that do not, over TCP and into a
real engine: no answer of class 5xx, none that takes long, none that tells of our insides; the engine is as before."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from lmdeploy.chat import resolve_template
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.core import EngineCore
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.context import LoadedEngine, ServerContext
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.openai.api_server import create_app
from lmdeploy.tokenizer import Tokenizer
from tests.serve.live import live
from tests.toy import write_model

KEY = {'x-api-key': 'secret-key'}
LIMITS = Limits(n=4, prompts=8, answers=8, request_seconds=20, bad_keys_per_minute=0)
CASES = 12  # of each operation, each way
INSIDES = re.compile(r'Traceback|0x[0-9a-f]{6,}|secret-key|site-packages|\.py\b')


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp('schema') / 'toy')
    executor = LocalExecutor(EngineConfig(device='cpu', num_blocks=64, session_len=96, max_batch_size=8,
                                          prefix_caching=True), folder)
    client = ThreadClient(lambda: EngineCore(executor, executor.start(), prefix_caching=True))
    tokenizer = Tokenizer(str(folder))
    frontend = AsyncFrontend(client, tokenizer, resolve_template(str(folder), tokenizer), client.capacity, 512)
    context = ServerContext(model_names=('toy',), engine=LoadedEngine(frontend), keys=KeyRing(['secret-key']),
                            limits=LIMITS)
    with live(SimpleNamespace(app=create_app(context))) as running:
        yield SimpleNamespace(url=running.url, context=context, client=client)
    frontend.grammars.close()
    client.close()
    executor.stop()


def answers(url: str) -> list[dict]:
    """What the engine says to the same questions, to the last bit."""
    body = {'model': 'toy', 'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 12, 'ignore_eos': True,
            'logprobs': True, 'top_logprobs': 3}
    found = [requests.post(f'{url}/v1/chat/completions', json=body | change, headers=KEY, timeout=20)
             for change in ({'temperature': 0}, {'seed': 7}, {'seed': 7, 'temperature': 1.5, 'top_k': 0})]
    return [answer.json()['choices'] for answer in found]


def test_no_request_that_the_description_allows_or_forbids_breaks_the_server(server):
    schema = schemathesis.openapi.from_url(f'{server.url}/openapi.json', headers=KEY)
    before = answers(server.url)
    counts = {'cases': 0, 'answered': 0}

    def look(case: schemathesis.Case) -> None:
        response = case.call(base_url=server.url, headers=KEY, timeout=15)
        counts['cases'] += 1
        counts['answered'] += response.status_code == 200
        assert response.status_code < 500, (case.path, case.body, response.text[:500])
        if response.status_code >= 400:
            assert len(response.content) < 16 << 10 and json.loads(response.content)['error']['message']
            assert not INSIDES.search(response.text), response.text
        elif response.headers['content-type'] == ['text/event-stream; charset=utf-8']:
            assert '"error"' not in response.text

    run = settings(max_examples=CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                   suppress_health_check=list(HealthCheck))
    operations = [found.ok() for found in schema.get_all_operations()]
    for operation in operations:
        run(given(operation.as_strategy(GenerationMode.POSITIVE))(look))()
        if operation.body:
            run(given(operation.as_strategy(GenerationMode.NEGATIVE))(look))()
    assert counts['cases'] > 300 and counts['answered'] > 60, counts
    assert answers(server.url) == before
    stats = server.client.stats()
    assert stats.in_flight == 0 and stats.used_blocks == 0
    server.context.metrics.check()
