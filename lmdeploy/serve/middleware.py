"""What every request passes before its route: identity, header limits, Host, CORS, and a guarded JSON body.

All of it works on the bare ASGI scope and messages: nothing buffers a stream, and nothing hides a disconnect.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec

from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits

Header = tuple[bytes, bytes]
REQUEST_ID = re.compile(rb'[A-Za-z0-9._:-]{1,128}')
JSON_TYPE = re.compile(rb'application/(?:[a-z0-9.-]+\+)?json', re.ASCII)
MOST_INT, LEAST_INT = (1 << 64) - 1, -(1 << 63)
TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
"""A text of JSON."""
METHODS = b'GET, POST, OPTIONS'
PREFLIGHT_SECONDS = b'600'


def request_id(headers: Sequence[Header]) -> str:
    """The client's ``x-request-id`` if it is a plain one, else a new id."""
    given = header(headers, b'x-request-id')
    return given.decode() if given is not None and REQUEST_ID.fullmatch(given) else uuid4().hex


def header(headers: Sequence[Header], name: bytes) -> bytes | None:
    """The first value of a header; ASGI servers give names in lower case."""
    return next((value for key, value in headers if key == name), None)


def check_headers(headers: Sequence[Header], limits: Limits, path_size: int = 0) -> None:
    """Refuse too many or too large header fields; the path counts as one.

    Raises:
        HttpError: LMD-510.
    """
    size = path_size + sum(len(name) + len(value) for name, value in headers)
    if len(headers) > limits.header_count or size > limits.header_bytes:
        raise HttpError('LMD-510', count=limits.header_count, most=limits.header_bytes)


def check_host(headers: Sequence[Header]) -> None:
    """On a loopback address, refuse names of other machines: a web page must not reach the server by rebinding a name.

    Raises:
        HttpError: LMD-522.
    """
    raw = (header(headers, b'host') or b'').decode('latin-1')
    name = raw.rsplit(':', 1)[0] if re.search(r':\d*$', raw) and not raw.endswith(']') else raw
    name = name.strip('[]').lower().rstrip('.')
    if name == 'localhost' or name.endswith('.localhost'):
        return
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        raise HttpError('LMD-522', host=raw[:100]) from None
    if not (address.is_loopback or address.is_unspecified):
        raise HttpError('LMD-522', host=raw[:100])


def check_content_type(headers: Sequence[Header]) -> None:
    """A body must be declared as JSON, which a foreign web page cannot do without asking first.

    Raises:
        HttpError: LMD-508.
    """
    kind = (header(headers, b'content-type') or b'').split(b';')[0].strip().lower()
    if not JSON_TYPE.fullmatch(kind):
        raise HttpError('LMD-508')


@dataclass(frozen=True, slots=True)
class Cors:
    """Which web pages may use the server. Without origins there are no CORS headers at all."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ('*',)
    headers: tuple[str, ...] = ('*',)
    credentials: bool = False

    def answer(self, headers: Sequence[Header]) -> list[Header]:
        """The headers that let the page of this request read the response."""
        origin = header(headers, b'origin')
        if origin is None or not self.origins:
            return []
        if '*' in self.origins:
            return [(b'access-control-allow-origin', b'*')]
        if origin.decode('latin-1') not in self.origins:
            return [(b'vary', b'Origin')]
        found = [(b'access-control-allow-origin', origin), (b'vary', b'Origin')]
        return found + [(b'access-control-allow-credentials', b'true')] if self.credentials else found

    def preflight(self, headers: Sequence[Header]) -> list[Header] | None:
        """What :meth:`answer` leaves out of the answer to a browser's question before a request; None if this is no
        such question."""
        asked = header(headers, b'access-control-request-method')
        if asked is None or not self.origins:
            return None
        methods = METHODS if '*' in self.methods else ', '.join(self.methods).encode('latin-1')
        names = header(headers, b'access-control-request-headers') or b''
        if '*' not in self.headers:
            names = ', '.join(self.headers).encode('latin-1')
        return [(b'access-control-allow-methods', methods), (b'access-control-allow-headers', names),
                (b'access-control-max-age', PREFLIGHT_SECONDS)]


def parse_json(body: bytes, limits: Limits) -> Any:
    """The value of a JSON text, refusing what Python's own parser lets through or breaks at.

    Raises:
        HttpError: LMD-511: not UTF-8, not JSON (NaN and Infinity are not), a number beyond 64 bits or beyond a double,
            nested too deep, or with half of a surrogate pair; or of more values than the limits allow.
    """
    if _opened(body) > limits.json_values and _opened(TEXT.sub(b'', body)) > limits.json_values:
        raise _too_many_values(limits)  # millions of lists take seconds to make and to forget
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise HttpError('LMD-511', reason=f'it is nested more than {limits.json_depth} levels deep') from None
    except UnicodeDecodeError as error:
        raise HttpError('LMD-511', reason=f'byte {error.start} is not UTF-8') from None
    except msgspec.DecodeError as error:
        raise HttpError('LMD-511', reason=str(error)[:200]) from None
    _check_values(value, limits)
    return value


def _opened(text: bytes) -> int:
    return text.count(b'[') + text.count(b'{')


def _too_many_values(limits: Limits) -> HttpError:
    return HttpError('LMD-511', reason=f'it has more than {limits.json_values} values that are no numbers')


def _check_values(value: Any, limits: Limits) -> None:
    """Depth of nesting, number of values and size of integers, without recursion: what reads the value next takes much
    longer for each of them than its bytes suggest."""
    level: list[Any] = [value]
    values = numbers = 0
    for depth in range(limits.json_depth + 1):
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is int or kind is float:
                numbers += 1
                if kind is int and not LEAST_INT <= item <= MOST_INT:
                    raise HttpError('LMD-511', reason='a number has more than 64 bits')
            elif kind is dict or kind is list:
                if depth == limits.json_depth:
                    raise HttpError('LMD-511', reason=f'it is nested more than {depth} levels deep')
                if kind is dict and len(item) > limits.json_keys:
                    raise HttpError('LMD-511', reason=f'an object has more than {limits.json_keys} keys')
                inner += item.values() if kind is dict else item
                values += 1
                if values + numbers + len(inner) > limits.json_values + limits.json_numbers:
                    break  # one of the two is exceeded, whichever comes first
            else:
                values += 1
        if values > limits.json_values:
            raise _too_many_values(limits)
        if numbers > limits.json_numbers or values + numbers + len(inner) > limits.json_values + limits.json_numbers:
            raise HttpError('LMD-511', reason=f'it has more than {limits.json_numbers} numbers')
        if not inner:
            return
        level = inner
