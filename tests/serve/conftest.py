"""Fixtures: ``serve`` starts an application over a fake device."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lmdeploy.chat import resolve_template
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.core import EngineCore
from lmdeploy.executor.base import Capacity
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.serve.context import LoadedEngine, ServerContext
from lmdeploy.serve.openai.api_server import create_app
from lmdeploy.tokenizer import Tokenizer
from tests.serve.fake_server import MODEL, SESSION, VOCAB, Server, SlowExecutor
from tests.toy import write_tokenizer


@pytest.fixture(scope='session')
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    (folder / 'config.json').write_text('{}')
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope='session')
def tokenizer(toy_folder):
    return Tokenizer(str(toy_folder))


@pytest.fixture
def serve(tokenizer, toy_folder) -> Callable[..., Server]:
    """``serve(step_seconds=0, num_blocks=64, **fields of ServerContext) -> Server``."""
    started = []

    def make(*, step_seconds: float = 0.0, num_blocks: int = 64, max_batch_size: int = 8, session_len: int = SESSION,
             fail_at: int | None = None, template: object = None, prefix_caching: bool = False, **fields) -> Server:
        capacity = Capacity(num_blocks=num_blocks, block_size=16, max_batch_size=max_batch_size, max_step_tokens=128,
                            session_len=session_len, vocab_size=VOCAB)
        executor = SlowExecutor(capacity, step_seconds, fail_at=fail_at)
        client = ThreadClient(lambda: EngineCore(executor, executor.start(), prefix_caching=prefix_caching))
        frontend = AsyncFrontend(client, tokenizer, template or resolve_template(str(toy_folder), tokenizer), capacity,
                                 session_len)
        context = ServerContext(**{'model_names': (MODEL,), 'engine': LoadedEngine(frontend), **fields})
        server = Server(context, create_app(context), frontend, client, executor)
        started.append(server)
        return server

    yield make
    for server in started:
        server.client.close()
        server.context.metrics.check()
