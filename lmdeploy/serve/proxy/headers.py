"""Which header fields go through the proxy.

To a node go those of a short list: no credential, cookie or forwarding field of a client can be among them, and none
that describes the connection. To a client goes everything but what describes the node's connection, its cookies, and
what the proxy says itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy.serve.auth import CALLER
from lmdeploy.serve.middleware import Header

TO_NODE = frozenset({b'accept', b'anthropic-beta', b'anthropic-version', b'content-type', b'openai-beta',
                     b'traceparent', b'tracestate', b'user-agent', b'x-request-timeout'})
HOP_BY_HOP = frozenset({b'connection', b'keep-alive', b'proxy-authenticate', b'proxy-authorization',
                        b'proxy-connection', b'te', b'trailer', b'transfer-encoding', b'upgrade'})  # RFC 9110, 7.6.1
OWN = frozenset({b'date', b'server', b'set-cookie', b'www-authenticate', b'x-content-type-options', b'x-request-id'})


def to_node(headers: Sequence[Header], *, authority: str, request_id: str, caller: str,
            key: str | None) -> list[Header]:
    """The fields of a request as a node gets them.

    Args:
        authority: the node's name for the Host field.
        caller: public id of the client's key: the node parts its callers by it.
        key: the proxy's own key at the node.
    """
    listed = _listed(headers)
    found = [(b'host', authority.encode()), (b'x-request-id', request_id.encode()), (b'accept-encoding', b'identity'),
             (CALLER, caller.encode())]
    if key is not None:
        found.append((b'authorization', b'Bearer ' + key.encode()))
    return found + [(name, value) for name, value in headers if name in TO_NODE and name not in listed]


def to_client(headers: Sequence[Header]) -> list[Header]:
    """The fields of a node's answer as the client gets them."""
    headers = [(name.lower(), value) for name, value in headers]
    dropped = HOP_BY_HOP | OWN | _listed(headers)
    return [(name, value) for name, value in headers
            if name not in dropped and not name.startswith(b'access-control-')]


def _listed(headers: Sequence[Header]) -> frozenset[bytes]:
    """The names that Connection fields list: those fields are meant for the next hop only."""
    return frozenset(name.strip().lower() for field, value in headers if field == b'connection'
                     for name in value.split(b','))
