"""``GET /v1/models``: the names that requests may give as ``model``."""

from __future__ import annotations

import hashlib

from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.http import Response, json_reply
from lmdeploy.serve.openai.answers import ModelCard, ModelList, ModelPermission


class Models:
    """The handler, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self) -> Response:
        frontend = self.context.engine.frontend
        length = None if frontend is None else frontend.capacity.session_len
        return json_reply(ModelList(data=[self._card(name, length) for name in self.context.model_names]))

    def _card(self, name: str, length: int | None) -> ModelCard:
        created = self.context.created
        permission = ModelPermission(id=f'modelperm-{hashlib.sha256(name.encode()).hexdigest()[:24]}', created=created)
        return ModelCard(id=name, created=created, root=name, permission=[permission], max_model_len=length)


