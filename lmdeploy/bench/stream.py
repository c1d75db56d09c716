"""One streamed answer over HTTP/1.1, event by event, on asyncio alone: a client that costs little beside its server."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.serve.fetch import Address, reason_of

LINE_BYTES = 1 << 20
MAX_DETAIL = 200


class StreamError(Exception):
    """A request that got no whole answer: its text says why, in a few words that group alike failures."""


@dataclass(slots=True)
class Answer:
    """What came back for one request; times in seconds on the clock of ``time.perf_counter``.

    Attributes:
        times: of the events that carried text.
        tokens: as the server counts them; 0: it did not.
        error: why there is no whole answer; empty: there is.
    """

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ''


async def ask(address: Address, path: str, body: dict[str, Any], api_key: str | None, timeout: float,
              tls: ssl.SSLContext | None = None) -> Answer:  # fmt: skip
    """Send a request for a streamed completion and read its answer to the end; never raises for what a server does."""
    answer = Answer(sent=time.perf_counter())
    try:
        await asyncio.wait_for(_exchange(address, path, body, api_key, tls, answer), timeout)
    except asyncio.TimeoutError:
        answer.error = f'no whole answer within {timeout:g} s'
    except StreamError as error:
        answer.error = str(error)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        answer.error = reason_of(error)
    answer.ended = time.perf_counter()
    return answer


async def _exchange(address: Address, path: str, body: dict[str, Any], api_key: str | None,
                    tls: ssl.SSLContext | None, answer: Answer) -> None:
    context = (tls or ssl.create_default_context()) if address.scheme == 'https' else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=LINE_BYTES)
    try:
        writer.write(_request(address, path, body, api_key))
        await writer.drain()
        await _read(reader, answer)
    finally:
        writer.close()


def _request(address: Address, path: str, body: dict[str, Any], api_key: str | None) -> bytes:
    data = json.dumps(body).encode()
    key = f'Authorization: Bearer {api_key}\r\n' if api_key else ''
    host = f'[{address.host}]' if ':' in address.host else address.host
    return (f'POST {address.prefix}{path} HTTP/1.1\r\nHost: {host}:{address.port}\r\nConnection: close\r\n'
            f'Content-Type: application/json\r\nContent-Length: {len(data)}\r\n{key}\r\n').encode() + data


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    words = (await reader.readline()).split()
    if len(words) < 2 or not words[1].isdigit():
        raise StreamError('the server closed the connection' if not words else 'the answer is not HTTP')
    status = int(words[1])
    headers = await _headers(reader)
    pieces = _chunks(reader) if headers.get('transfer-encoding') == 'chunked' else _pieces(reader)
    if status != 200:
        text = b''.join([piece async for piece in pieces]).decode('utf-8', 'replace')
        raise StreamError(f'HTTP {status}: {_message(text)}')
    complete, rest = False, b''
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b'\n')
        now = time.perf_counter()
        for line in lines:
            complete = _event(line.strip(), now, answer) or complete
    if not complete:
        raise StreamError('the stream broke off')


def _event(line: bytes, now: float, answer: Answer) -> bool:
    """Take in one line; whether it ends the stream."""
    if not line.startswith(b'data:'):
        return False
    data = line[5:].strip()
    if data == b'[DONE]':
        return True
    event = json.loads(data)
    if 'error' in event:
        raise StreamError(_message(data.decode('utf-8', 'replace')))
    usage = event.get('usage')
    if usage:
        answer.prompt_tokens, answer.tokens = usage['prompt_tokens'], usage['completion_tokens']
    if any(choice.get('text') or choice.get('finish_reason') for choice in event.get('choices', ())):
        answer.times.append(now)
    return False


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    found = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode('latin-1').partition(':')
        found[name.strip().lower()] = value.strip().lower()
    return found


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b'\r\n')).split(b';')[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece


def _message(text: str) -> str:
    """What an error's JSON says, or its beginning."""
    try:
        value = json.loads(text)
    except ValueError:
        return text[:MAX_DETAIL]
    error = value.get('error', value) if isinstance(value, dict) else value
    message = error.get('message', error) if isinstance(error, dict) else error
    return str(message)[:MAX_DETAIL]
