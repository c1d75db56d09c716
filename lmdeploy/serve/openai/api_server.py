"""The routes of the API server, and the application over them."""

from __future__ import annotations

from lmdeploy.serve.anthropic.events import MessageAnswer, TokenCount, message_failure
from lmdeploy.serve.anthropic.messages import CountTokens, Messages
from lmdeploy.serve.app import App
from lmdeploy.serve.auth import Access
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.openai import answers
from lmdeploy.serve.openai.chat import Chat
from lmdeploy.serve.openai.completions import Completions
from lmdeploy.serve.openai.embeddings import Embeddings
from lmdeploy.serve.openai.generate import Generate
from lmdeploy.serve.openai.interactive import Interactive
from lmdeploy.serve.openai.models import Models
from lmdeploy.serve.openai.responses import Responses
from lmdeploy.serve.openai.responses_events import ResponseDeleted, ResponseObject
from lmdeploy.serve.openai.tokenize import Detokenize, Encode, Tokenize
from lmdeploy.serve.operations import Aborted, HealthInfo, Operations
from lmdeploy.serve.page import Page
from lmdeploy.serve.routes import Routes


def create_app(context: ServerContext) -> App:
    """The ASGI application of a server."""
    routes = Routes()
    add_inference(routes, context)
    add_anthropic(routes, context)
    add_operations(routes, context)
    if context.page:
        add_page(routes)
    return App(context, routes, docs=context.docs, models=context.model_names)


def add_inference(routes: Routes, context: ServerContext) -> None:
    """What the model answers."""
    user = Access.USER
    models = Models(context)
    routes.add('GET', '/v1/models', models.all, user, 'the models that are served', answer=answers.ModelList)
    routes.add('GET', '/v1/models/{model:path}', models.one, user, 'one of them', answer=answers.ModelCard)
    routes.add('POST', '/v1/chat/completions', Chat(context), user, 'answer a conversation',
               answer=answers.ChatCompletion)
    routes.add('POST', '/v1/completions', Completions(context), user, 'continue texts', answer=answers.Completion)
    responses = Responses(context)
    routes.add('POST', '/v1/responses', responses.create, user, 'answer, and remember the answer',
               answer=ResponseObject)
    routes.add('GET', '/v1/responses/{response_id}', responses.get, user, 'an answer that is remembered',
               answer=ResponseObject)
    routes.add('DELETE', '/v1/responses/{response_id}', responses.delete, user, 'forget an answer',
               answer=ResponseDeleted)
    routes.add('POST', '/v1/embeddings', Embeddings(context), user, 'texts as vectors', answer=answers.EmbeddingList)
    routes.add('POST', '/v1/encode', Encode(context), user, 'texts to tokens', answer=answers.Encoded)
    routes.add('POST', '/v1/chat/interactive', Interactive(context), user, 'a conversation that the server remembers',
               answer=answers.InteractiveAnswer)
    routes.add('POST', '/generate', Generate(context), user, 'one answer with its tokens',
               answer=answers.GenerateAnswer)
    routes.add('POST', '/tokenize', Tokenize(context), user, 'a text or a conversation to tokens',
               answer=answers.Tokenized)
    routes.add('POST', '/detokenize', Detokenize(context), user, 'tokens to a text', answer=answers.Detokenized)


def add_anthropic(routes: Routes, context: ServerContext) -> None:
    """The same under Anthropic's interface, errors included."""
    routes.add('POST', '/v1/messages', Messages(context), Access.USER, "answer a conversation, in Anthropic's form",
               answer=MessageAnswer, failure=message_failure)
    routes.add('POST', '/v1/messages/count_tokens', CountTokens(context), Access.USER,
               'how many tokens the prompt of a message has', answer=TokenCount, failure=message_failure)


def add_operations(routes: Routes, context: ServerContext) -> None:
    """About the server itself."""
    operations = Operations(context)
    metrics = Access.OPEN if context.public_metrics else Access.USER
    routes.add('GET', '/health', operations.health, Access.OPEN, 'how the engine is', answer=HealthInfo)
    routes.add('GET', '/ready', operations.ready, Access.OPEN, 'whether new requests are taken', answer=HealthInfo)
    routes.add('POST', '/abort_request', operations.abort, Access.USER, "end one's own running requests",
               answer=Aborted)
    routes.add('GET', '/is_sleeping', operations.is_sleeping, Access.USER, 'whether the engine sleeps')
    routes.add('POST', '/sleep', operations.sleep, Access.ADMIN, "give the engine's memory back", answer=HealthInfo)
    routes.add('POST', '/wakeup', operations.wakeup, Access.ADMIN, 'load the model again', answer=HealthInfo)
    if context.expose_metrics:
        routes.add('GET', '/metrics', operations.metrics, metrics, 'Prometheus metrics')
    if context.terminate is not None:
        routes.add('POST', '/terminate', operations.terminate, Access.ADMIN, 'shut the server down')


def add_page(routes: Routes) -> None:
    """The chat page, for browsers."""
    page = Page()
    routes.add('GET', '/', page.index, Access.OPEN, 'a page to chat with the model')
    routes.add('GET', '/ui/{name}', page.part, Access.OPEN, 'the files of that page')
