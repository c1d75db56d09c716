"""``GET /v1/models``, ``/v1/models/NAME``: the names that requests may give as ``model``."""

from __future__ import annotations

import hashlib

from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Response, json_reply
from lmdeploy.serve.openai.answers import ModelCard, ModelList, ModelPermission


class Models:
    """The handlers, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def all(self) -> Response:
        """The list."""
        return json_reply(ModelList(data=[self._card(name) for name in self.context.model_names]))

    async def one(self, model: str) -> Response:
        """The entry of a name."""
        if not model:
            raise HttpError('LMD-506')
        self.context.check_model(model)
        return json_reply(self._card(model))

    def _card(self, name: str) -> ModelCard:
        frontend = self.context.engine.frontend
        length = None if frontend is None else frontend.capacity.session_len
        created = self.context.created
        permission = ModelPermission(id=f'modelperm-{hashlib.sha256(name.encode()).hexdigest()[:24]}', created=created)
        return ModelCard(id=name, created=created, root=name, permission=[permission], max_model_len=length)


