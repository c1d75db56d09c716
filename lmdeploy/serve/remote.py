"""ProcessEngine: the engine in its own process, and what is needed here to speak with it: tokenizer and template."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lmdeploy.chat import resolve_template
from lmdeploy.chat.config import ChatTemplateConfig
from lmdeploy.chat.template import ChatTemplate
from lmdeploy.config.encoder import is_encoder
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.remote import Health, ProcessClient
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.frontend.pictures import pictures_of
from lmdeploy.grammar.checker import Checker
from lmdeploy.grammar.sandbox import Sandbox
from lmdeploy.serve.media import only_loaded
from lmdeploy.tokenizer import Tokenizer


class ProcessEngine:
    """An :class:`lmdeploy.serve.context.Engine`. The engine's process starts at once, and loads when :meth:`load` runs.

    Args:
        config: of the engine.
        path: model folder or ``.gguf`` file.
        template: what the user chose; None: the model's own.
    """

    def __init__(self, config: EngineConfig, path: Path, template: ChatTemplateConfig | None = None) -> None:
        self.frontend: AsyncFrontend | None = None
        self.client = ProcessClient(config, path)
        self._path, self._template = path, template

    async def load(self) -> None:
        """Returns when requests can be served.

        Raises:
            LmdeployError: what is wrong with the model, its tokenizer or its template.
        """
        engine = asyncio.ensure_future(self.client.ready())
        try:
            tokenizer, template = await asyncio.to_thread(self._read)
            capacity = await engine
        finally:
            engine.cancel()
        self.frontend = AsyncFrontend(self.client, tokenizer, template, capacity, self.client.context_len,
                                      Checker(Sandbox()), pictures_of(self._path, tokenizer, capacity, only_loaded))

    def health(self) -> Health:
        return self.client.health()

    async def sleep(self) -> None:
        await self.client.sleep()

    async def wakeup(self) -> None:
        await self.client.wakeup()

    async def close(self) -> None:
        """End the engine's process, and those in which grammars are tried out."""
        if self.frontend is not None:
            self.frontend.grammars.close()
        await self.client.aclose()

    def _read(self) -> tuple[Tokenizer, ChatTemplate]:
        tokenizer = Tokenizer(str(self._path))
        template = ChatTemplateConfig('base') if is_encoder(self._path) else self._template  # which has no chats
        return tokenizer, resolve_template(str(self._path), tokenizer, template)
