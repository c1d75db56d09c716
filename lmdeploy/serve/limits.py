"""Limits: one table of everything that a request, a client or the server may use, and the one way to enforce it.

``lmdeploy serve api_server --print-limits`` prints it; ``--limit NAME=VALUE`` changes an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass, field, fields, replace

from lmdeploy.errors import ConfigError
from lmdeploy.serve.errors import HttpError

MIB = 1 << 20


def _limit(default: int, unit: str, what: str, least: int = 1) -> int:
    return field(default=default, metadata={'unit': unit, 'what': what, 'least': least})


@dataclass(frozen=True, slots=True)
class Limits:
    """Every entry is an upper bound. ``0`` means no limit where that is possible."""

    # a request as bytes
    body_bytes: int = _limit(8 * MIB, 'bytes', 'body of a request')
    header_bytes: int = _limit(64 << 10, 'bytes', 'all header fields together')
    header_count: int = _limit(100, 'fields', 'header fields')
    json_depth: int = _limit(64, 'levels', 'nesting of a JSON body')
    json_values: int = _limit(1 << 16, 'values', 'of a JSON body that are no numbers')
    json_numbers: int = _limit(1 << 20, 'numbers', 'of a JSON body')
    json_keys: int = _limit(4096, 'keys', 'of one object of a JSON body')
    body_seconds: int = _limit(60, 'seconds', 'until a body has arrived as a whole')
    body_idle_seconds: int = _limit(15, 'seconds', 'between two pieces of a body')
    # a request's fields
    messages: int = _limit(4096, 'entries', 'messages of a conversation')
    prompts: int = _limit(256, 'entries', 'prompts of a completion, inputs of an embedding or encoding')
    n: int = _limit(128, 'answers', 'answers to one prompt')
    answers: int = _limit(1024, 'answers', 'answers of one request: prompts times n')
    tokens: int = _limit(1 << 20, 'tokens', 'answers of one request times their max_tokens')
    max_tokens: int = _limit(1 << 20, 'tokens', 'max_tokens of one answer')
    stop: int = _limit(16, 'entries', 'stop texts')
    stop_chars: int = _limit(256, 'characters', 'one stop text')
    stop_token_ids: int = _limit(128, 'entries', 'stop token ids')
    logit_bias: int = _limit(1024, 'entries', 'entries of logit_bias')
    logprobs: int = _limit(20, 'tokens', 'alternatives per token')
    tools: int = _limit(128, 'entries', 'tools')
    tool_bytes: int = _limit(256 << 10, 'bytes', 'all tools together, as JSON')
    images: int = _limit(16, 'pictures', 'of one request')
    image_bytes: int = _limit(20 * MIB, 'bytes', 'one picture as it is stored')
    image_pixels: int = _limit(40_000_000, 'pixels', 'one picture')
    images_bytes: int = _limit(64 * MIB, 'bytes', 'all pictures of one request')
    images_pixels: int = _limit(80_000_000, 'pixels', 'all pictures of one request')
    fetch_seconds: int = _limit(10, 'seconds', 'to fetch one picture')
    name_chars: int = _limit(256, 'characters', 'user, and other names that a request gives')
    # what a client may hold
    stream_bytes: int = _limit(256 << 10, 'bytes', 'a stream that its reader has not taken yet')
    stall_seconds: int = _limit(30, 'seconds', 'without progress of a reader until its stream is given up')
    sessions: int = _limit(1024, 'conversations', 'remembered by /v1/chat/interactive; the oldest are forgotten')
    session_bytes: int = _limit(MIB, 'bytes', 'text of one remembered conversation')
    responses: int = _limit(1024, 'answers', 'of one key, remembered by /v1/responses; the oldest are forgotten')
    response_bytes: int = _limit(16 * MIB, 'bytes', 'all that /v1/responses remembers for one key')
    # the server as a whole
    queue: int = _limit(512, 'answers', 'waiting for the engine; more are turned away with 503', least=0)
    request_seconds: int = _limit(600, 'seconds', 'for a request to be answered (--request-timeout)')
    connections: int = _limit(1024, 'connections', 'open at a time')
    # one client address: an IPv4 address, or an IPv6 network of 64 bits
    address_connections: int = _limit(512, 'connections', 'of one address at a time (0: no limit)', least=0)
    bad_keys_per_minute: int = _limit(60, 'keys', 'wrong ones of one address that get a 401; then 429 (0: no limit)',
                                      least=0)
    # one key
    key_requests: int = _limit(0, 'requests', 'of one key at a time (0: no limit)', least=0)
    key_requests_per_minute: int = _limit(0, 'requests', 'of one key per minute (0: no limit)', least=0)
    key_tokens_per_minute: int = _limit(0, 'tokens', 'of one key per minute, prompts and answers (0: no limit)',
                                        least=0)

    def check(self, name: str, given: int | Sized, param: str) -> None:
        """Refuse a value, or a collection by its length, that is beyond the entry ``name``.

        Raises:
            HttpError: LMD-512; ``param`` is the request's field.
        """
        size = given if isinstance(given, int) else len(given)
        most = getattr(self, name)
        if size > most:
            unit = next(spec.metadata['unit'] for spec in fields(self) if spec.name == name)
            raise HttpError('LMD-512', param=param, reason=f'{size:,} is beyond the limit of {most:,} {unit}')

    def change(self, assignments: Iterable[str]) -> Limits:
        """The limits after ``['body_bytes=1000', ...]``.

        Raises:
            ConfigError: LMD-527, an unknown name or an impossible value.
        """
        known = {spec.name: spec for spec in fields(self)}
        changes = {}
        for assignment in assignments:
            name, _, text = assignment.partition('=')
            name = name.strip().replace('-', '_')
            if name not in known:
                raise ConfigError('LMD-527', option='--limit', value=assignment,
                                  reason=f'known limits are {", ".join(known)}')
            least = known[name].metadata['least']
            if not (text.isascii() and text.isdigit()) or not least <= int(text[:20]) < 1 << 48:
                raise ConfigError('LMD-527', option='--limit', value=assignment,
                                  reason=f'the value must be a whole number from {least}')
            changes[name] = int(text)
        return replace(self, **changes)

    def lines(self) -> list[str]:
        """The table as text."""
        return [f'{spec.name:<24} {getattr(self, spec.name):>12,} {spec.metadata["unit"]:<14}{spec.metadata["what"]}'
                for spec in fields(self)]
