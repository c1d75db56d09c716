"""A server over a fake device: its context, its application, and clients that talk to it in this process."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import httpx

from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.fake import FakeExecutor
from lmdeploy.executor.base import Capacity
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.serve.context import ServerContext

VOCAB, SESSION = 303, 256
MODEL = '/models/toy'
CHAT = {'model': MODEL, 'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 8}


@dataclass
class Server:
    """A running application and what is behind it."""

    context: ServerContext
    app: object
    frontend: AsyncFrontend
    client: ThreadClient
    executor: FakeExecutor

    def http(self, **options) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app, raise_app_exceptions=True),
                                 base_url='http://127.0.0.1', **options)

    def ask(self, method: str, path: str, **options) -> httpx.Response:
        """One request, in a loop of its own."""
        async def one() -> httpx.Response:
            async with self.http() as http:
                return await http.request(method, path, **options)

        return asyncio.run(asyncio.wait_for(one(), 30))

    def post(self, path: str, body: object, **options) -> httpx.Response:
        return self.ask('POST', path, json=body, **options)

    def settled(self) -> bool:
        """Whether, within a second, nothing runs and no block is held."""
        async def wait() -> bool:
            for _ in range(100):
                stats = self.client.stats()
                if stats.in_flight == 0 and stats.used_blocks == 0 and not self.context.running:
                    return True
                await asyncio.sleep(0.01)
            return False

        return asyncio.run(wait())


class SlowExecutor(FakeExecutor):
    """Takes its time over each step, so that a test can act in the middle of an answer."""

    def __init__(self, capacity: Capacity, seconds: float = 0.0, **fake) -> None:
        super().__init__(capacity, **fake)
        self.seconds = seconds

    def launch(self, plan):
        if self.seconds:
            time.sleep(self.seconds)
        return super().launch(plan)


def events(text: str) -> list[object]:
    """The data of a stream's events; ``[DONE]`` stays a text."""
    assert text.endswith('\n\n'), text[-100:]
    found = []
    for block in text[:-2].split('\n\n'):
        assert block.startswith('data: ') and '\n' not in block, block
        found.append(block[6:] if block == 'data: [DONE]' else json.loads(block[6:]))
    return found


def named_events(text: str) -> list[dict]:
    """The data of a stream whose events have names: each says its name again as its type."""
    assert text.endswith('\n\n') or not text, text[-100:]
    found = []
    for block in text.split('\n\n')[:-1]:
        name, data = block.split('\n')
        assert name.startswith('event: ') and data.startswith('data: '), block
        found.append(json.loads(data[6:]))
        assert found[-1]['type'] == name[7:]
    return found
