"""APIClient: a server's interface as Python methods that yield what the server sends, as dicts.

It needs nothing but the standard library. What a server answers is yielded as it is, its errors too: HTTP errors are
never raised. A server that cannot be reached, or breaks off, raises :class:`ServerConnectionError`.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from typing import Any

from lmdeploy.errors import LmdeployError
from lmdeploy.log import get_logger
from lmdeploy.serve.fetch import Address, Response, ServerConnectionError, fetch

__all__ = ['APIClient', 'ServerConnectionError', 'ServerError', 'get_model_list', 'get_streaming_response',
           'input_prompt', 'json_loads']

TIMEOUT_SECONDS = 660.0  # more than a server takes to give a request up
Messages = str | list[dict[str, Any]]


class ServerError(LmdeployError):
    """An error that a server told, as an exception.

    Its text is the server's, and English; ``code`` is the server's error code, or ``HTTP status``.

    Args:
        answer: the JSON that the server sent.
    """

    def __init__(self, answer: dict[str, Any]) -> None:
        error = answer.get('error')
        detail: dict[str, Any] = error if isinstance(error, dict) else answer
        self.answer = answer
        self.code = str(detail.get('lmdeploy_code') or f'HTTP {answer.get("code", "error")}')
        self.params = {'param': detail.get('param')}
        Exception.__init__(self, str(detail.get('message') or answer))

    def text(self, lang: str = 'en') -> str:
        return str(self.args[0])

    def __reduce__(self):
        return (type(self), (self.answer,))


class APIClient:
    """A client of one server.

    Args:
        api_server_url: ``http://HOST:PORT``; 0.0.0.0 stands for this machine.
        api_key: sent with every request; None: the server has no keys.
        timeout: seconds without a byte from the server after which a request is given up; None: never.
        tls: how an ``https`` server is trusted; None: by the system's certificates.

    Raises:
        ConfigError: LMD-581, the address is none.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None, *, timeout: float | None = TIMEOUT_SECONDS,
                 tls: ssl.SSLContext | None = None) -> None:
        self.api_server_url = api_server_url
        self.api_key = api_key
        self._address = Address.parse(api_server_url)
        self._timeout, self._tls = timeout, tls
        self._models: list[str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        fields = {'Content-Type': 'application/json'}
        return fields | {'Authorization': f'Bearer {self.api_key}'} if self.api_key is not None else fields

    @property
    def available_models(self) -> list[str] | None:
        """:meth:`models`; None if the server refuses to tell: the log says why."""
        try:
            return self.models()
        except ServerError as error:
            get_logger().error('the models of %s are not known: %s', self.api_server_url, error)
            return None

    def models(self) -> list[str]:
        """The names that requests may give as ``model``, asked for once.

        Raises:
            ServerError: the server refuses to tell.
        """
        if self._models is None:
            with self._fetch('GET', '/v1/models') as response:
                answer = _value(response)
            if response.status >= 400 or not isinstance(answer.get('data'), list):
                raise ServerError(answer)
            self._models = [card['id'] for card in answer['data']]
        return self._models

    def encode(self, input: str | list[str], do_preprocess: bool | None = False,
               add_bos: bool | None = True) -> tuple[Any, Any]:
        """Texts to tokens: ``(input_ids, length)`` of a text, or lists of these.

        Args:
            do_preprocess: put each text into the chat template as a user's message.
            add_bos: begin with the model's first token.

        Raises:
            ServerError: the server refuses.
        """
        payload = {'input': input, 'do_preprocess': do_preprocess, 'add_bos': add_bos}
        answer = self._one('/v1/encode', payload)
        return answer['input_ids'], answer['length']

    def chat_completions_v1(self, model: str, messages: Messages, temperature: float | None = 0.7,
                            top_p: float | None = 1.0, logprobs: bool | None = False, top_logprobs: int | None = 0,
                            n: int | None = 1, max_tokens: int | None = None, stop: str | list[str] | None = None,
                            stream: bool | None = False, presence_penalty: float | None = 0.0,
                            frequency_penalty: float | None = 0.0, user: str | None = None,
                            repetition_penalty: float | None = 1.0, ignore_eos: bool | None = False,
                            skip_special_tokens: bool | None = True, spaces_between_special_tokens: bool | None = True,
                            top_k: int | None = 40, min_new_tokens: int | None = None, min_p: float | None = 0.0,
                            logit_bias: dict[str, float] | None = None, stream_options: dict[str, Any] | None = None,
                            **more: Any) -> Iterator[dict[str, Any]]:
        """Answers to a conversation: one completion, or its chunks with ``stream``.

        ``more`` are further fields of the request, such as ``tools``, ``response_format`` or ``seed``.
        """
        return self._items('/v1/chat/completions', _fields(locals()))

    def completions_v1(self, model: str, prompt: str | list[Any], suffix: str | None = None,
                       temperature: float | None = 0.7, n: int | None = 1, max_tokens: int | None = 16,
                       stream: bool | None = False, stop: str | list[str] | None = None, top_p: float | None = 1.0,
                       top_k: int | None = 40, user: str | None = None, repetition_penalty: float | None = 1.0,
                       ignore_eos: bool | None = False, skip_special_tokens: bool | None = True,
                       spaces_between_special_tokens: bool | None = True,
                       stream_options: dict[str, Any] | None = None, **more: Any) -> Iterator[dict[str, Any]]:
        """Continuations of raw prompts: one completion, or its chunks with ``stream``; ``more`` are further fields."""
        return self._items('/v1/completions', _fields(locals()))

    def chat_interactive_v1(self, prompt: Messages, image_url: str | list[str] | None = None, session_id: int = -1,
                            interactive_mode: bool = False, stream: bool = False, stop: str | list[str] | None = None,
                            request_output_len: int | None = None, top_p: float = 0.8, top_k: int = 40,
                            temperature: float = 0.8, repetition_penalty: float = 1.0, ignore_eos: bool = False,
                            skip_special_tokens: bool | None = True, adapter_name: str | None = None,
                            **more: Any) -> Iterator[dict[str, Any]]:
        """An answer, or its pieces with ``stream``; with ``interactive_mode`` the server remembers the conversation.

        ``more`` are further fields of the request, such as ``seed``, ``min_p`` or ``min_new_tokens``.
        """
        return self._items('/v1/chat/interactive', _fields(locals()))

    def chat(self, prompt: str, session_id: int, image_url: str | list[str] | None = None,
             request_output_len: int | None = 512, stream: bool = False, top_p: float = 0.8, top_k: int = 40,
             temperature: float = 0.8, repetition_penalty: float = 1.0, ignore_eos: bool = False,
             skip_special_tokens: bool | None = True,
             adapter_name: str | None = None) -> Iterator[tuple[str, int, str | None]]:
        """The next answer of a conversation that the server remembers: ``(text, tokens so far, finish_reason)``.

        Raises:
            ValueError: session -1 is none that can go on.
            ServerError: the server refuses.
        """
        if session_id == -1:
            raise ValueError('session_id must be a number from 0')
        fields = _fields(locals())
        return (_triple(item) for item in self.chat_interactive_v1(interactive_mode=True, **fields))

    def end_session(self, session_id: int) -> None:
        """Let the server forget a conversation.

        Raises:
            ServerError: the server refuses.
        """
        self._one('/v1/chat/interactive', {'prompt': '', 'session_id': session_id, 'request_output_len': 0,
                                           'interactive_mode': False})

    def cancel_session(self, session_id: int) -> None:
        """Stop what runs in a conversation; its stream ends with the finish reason ``'abort'``.

        Raises:
            ServerError: the server refuses.
        """
        self._one('/v1/chat/interactive', {'session_id': session_id, 'cancel': True})

    def health(self) -> tuple[bool, str]:
        """Whether the server serves, and what it says of itself."""
        with self._fetch('GET', '/health') as response:
            text = response.read().decode('utf-8', 'replace')
        return response.status == 200, text

    def close(self) -> None:
        """Nothing is kept open between requests; a client that has started its server ends it."""

    def __enter__(self) -> APIClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fetch(self, method: str, path: str, payload: dict[str, Any] | None = None) -> Response:
        return fetch(self._address, method, path, payload, self.headers, timeout=self._timeout, tls=self._tls)

    def _one(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        with self._fetch('POST', path, payload) as response:
            answer = _value(response)
        if response.status >= 400:
            raise ServerError(answer)
        return answer

    def _items(self, path: str, payload: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._fetch('POST', path, payload) as response:
            if response.status < 400 and response.streams:
                yield from _events(response)
            else:
                yield _value(response)


def _fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """A request's fields: the arguments of a method, as its ``locals()``, with those of ``more`` among them."""
    more = arguments.get('more', {})
    return {name: value for name, value in arguments.items() if name not in ('self', 'more')} | more


def _value(response: Response) -> dict[str, Any]:
    """The JSON object of a whole body. An error that is none (of a gateway, say) becomes one."""
    body = response.read()
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    text = body[:500].decode('utf-8', 'replace').strip()
    if response.status < 400:
        raise response.strange(f'no JSON object: {text[:80]!r}')
    error = {'message': text or f'status {response.status}', 'type': 'http_error', 'code': str(response.status),
             'param': None}
    return {'object': 'error', **error, 'code': response.status, 'error': error}


def _events(response: Response) -> Iterator[dict[str, Any]]:
    """The objects of a stream: server-sent events, which end with ``[DONE]`` or an error, or bare lines of JSON."""
    complete = True
    for line in response.lines():
        text = line.removeprefix('data:').strip()
        if not text or not line.startswith(('data:', '{')):
            continue  # between events; their names and comments
        if text == '[DONE]':
            return
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise response.strange(f'no JSON object: {text[:80]!r}')
        complete = not line.startswith('data:') or 'error' in value
        yield value
    if not complete:
        raise response.lost('the stream has no end')


def _triple(item: dict[str, Any]) -> tuple[str, int, str | None]:
    if 'error' in item or 'text' not in item:
        raise ServerError(item)
    return item['text'], item['tokens'], item['finish_reason']


def get_model_list(api_url: str, headers: dict[str, str] | None = None) -> list[str] | None:
    """The names of the models behind ``http://HOST:PORT/v1/models``; None if the server refuses to tell."""
    url, _, _ = api_url.rpartition('/v1/models')
    key = next((value for name, value in (headers or {}).items() if name.lower() == 'authorization'), None)
    return APIClient(url or api_url, None if key is None else key.partition(' ')[2]).available_models


def json_loads(content: str | bytes) -> Any:
    """The value of a JSON text; ``''`` and a warning if it is none."""
    try:
        return json.loads(content)
    except ValueError:
        get_logger().warning('no JSON: %.200r', content)
        return ''


def input_prompt() -> str:
    """Read lines from the terminal until an empty one."""
    print('\ndouble enter to end input >>> ', end='')
    return '\n'.join(iter(input, ''))


def get_streaming_response(prompt: str, api_url: str, session_id: int, request_output_len: int | None = 512,
                           stream: bool = True, interactive_mode: bool = False, ignore_eos: bool = False,
                           cancel: bool = False, top_p: float = 0.8, temperature: float = 0.7,
                           api_key: str | None = None) -> Iterator[tuple[str, int, str | None]]:
    """``(text, tokens so far, finish_reason)`` of an answer, from ``http://HOST:PORT/v1/chat/interactive``.

    Raises:
        ServerError: the server refuses.
    """
    url, _, _ = api_url.rpartition('/v1/chat/interactive')
    client = APIClient(url or api_url, api_key)
    items = client.chat_interactive_v1(
        prompt, session_id=session_id, interactive_mode=interactive_mode, stream=stream,
        request_output_len=request_output_len, top_p=top_p, temperature=temperature, ignore_eos=ignore_eos,
        cancel=cancel)
    return (_triple(item) for item in items)
