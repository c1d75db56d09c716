"""The routes of the API server, and the application over them."""

from __future__ import annotations

from lmdeploy.serve.app import App
from lmdeploy.serve.auth import Access
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.openai.answers import ChatCompletion, Completion, ModelList
from lmdeploy.serve.openai.chat import Chat
from lmdeploy.serve.openai.completions import Completions
from lmdeploy.serve.openai.models import Models
from lmdeploy.serve.openai.protocol import ChatRequest, CompletionRequest
from lmdeploy.serve.routes import Route, Router


def create_app(context: ServerContext) -> App:
    """The ASGI application of a server."""
    return App(context, Router(routes(context)))


def routes(context: ServerContext) -> list[Route]:
    """Every route; one line here is all that a new one needs."""
    user = Access.USER
    return [
        Route('GET', '/v1/models', Models(context), user, 'the models that are served', answer=ModelList),
        Route('POST', '/v1/chat/completions', Chat(context), user, 'answer a conversation', ChatRequest,
              ChatCompletion),
        Route('POST', '/v1/completions', Completions(context), user, 'continue texts', CompletionRequest, Completion),
    ]
