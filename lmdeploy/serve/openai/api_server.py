"""The routes of the API server, and the application over them."""

from __future__ import annotations

from lmdeploy.serve.app import App
from lmdeploy.serve.auth import Access
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.openai import answers, protocol
from lmdeploy.serve.openai.chat import Chat
from lmdeploy.serve.openai.completions import Completions
from lmdeploy.serve.openai.embeddings import Embeddings
from lmdeploy.serve.openai.generate import Generate
from lmdeploy.serve.openai.interactive import Interactive
from lmdeploy.serve.openai.models import Models
from lmdeploy.serve.openai.tokenize import Detokenize, Encode, Tokenize
from lmdeploy.serve.openapi import Docs
from lmdeploy.serve.operations import Aborted, HealthInfo, Operations
from lmdeploy.serve.routes import Route, Router


def create_app(context: ServerContext) -> App:
    """The ASGI application of a server."""
    found = [*inference_routes(context), *operation_routes(context)]
    if context.docs:
        docs = Docs(context.model_names)
        found += [Route('GET', '/openapi.json', docs.openapi, Access.USER, 'this interface, for tools'),
                  Route('GET', '/docs', docs.page, Access.USER, 'this interface, for readers')]
        docs.router = router = Router(found)
        return App(context, router)
    return App(context, Router(found))


def inference_routes(context: ServerContext) -> list[Route]:
    """What the model answers."""
    user = Access.USER
    return [
        Route('GET', '/v1/models', Models(context), user, 'the models that are served', answer=answers.ModelList),
        Route('POST', '/v1/chat/completions', Chat(context), user, 'answer a conversation', protocol.ChatRequest,
              answers.ChatCompletion),
        Route('POST', '/v1/completions', Completions(context), user, 'continue texts', protocol.CompletionRequest,
              answers.Completion),
        Route('POST', '/v1/embeddings', Embeddings(context), user, 'texts as vectors', protocol.EmbeddingRequest,
              answers.EmbeddingList),
        Route('POST', '/v1/encode', Encode(context), user, 'texts to tokens', protocol.EncodeRequest, answers.Encoded),
        Route('POST', '/v1/chat/interactive', Interactive(context), user, 'a conversation that the server remembers',
              protocol.InteractiveRequest, answers.InteractiveAnswer),
        Route('POST', '/generate', Generate(context), user, 'one answer with its tokens', protocol.GenerateRequest,
              answers.GenerateAnswer),
        Route('POST', '/tokenize', Tokenize(context), user, 'a text or a conversation to tokens',
              protocol.TokenizeRequest, answers.Tokenized),
        Route('POST', '/detokenize', Detokenize(context), user, 'tokens to a text', protocol.DetokenizeRequest,
              answers.Detokenized),
    ]


def operation_routes(context: ServerContext) -> list[Route]:
    """About the server itself."""
    operations = Operations(context)
    metrics = Access.OPEN if context.public_metrics else Access.USER
    routes = [
        Route('GET', '/health', operations.health, Access.OPEN, 'how the engine is', answer=HealthInfo),
        Route('GET', '/ready', operations.ready, Access.OPEN, 'whether new requests are taken', answer=HealthInfo),
        Route('POST', '/abort_request', operations.abort, Access.USER, "end one's own running requests",
              protocol.AbortRequest, Aborted),
        Route('GET', '/is_sleeping', operations.is_sleeping, Access.USER, 'whether the engine sleeps'),
        Route('POST', '/sleep', operations.sleep, Access.ADMIN, "give the engine's memory back", answer=HealthInfo),
        Route('POST', '/wakeup', operations.wakeup, Access.ADMIN, 'load the model again', answer=HealthInfo),
    ]
    if context.expose_metrics:
        routes.append(Route('GET', '/metrics', operations.metrics, metrics, 'Prometheus metrics'))
    if context.terminate is not None:
        routes.append(Route('POST', '/terminate', operations.terminate, Access.ADMIN, 'shut the server down'))
    return routes
