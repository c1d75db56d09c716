"""A proxy from its port to its end."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import replace

from lmdeploy.serve.lifecycle import Watcher, serve
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.listener import RESERVE, descriptors
from lmdeploy.serve.proxy.app import create_app
from lmdeploy.serve.proxy.context import ProxyContext


async def run_proxy(context: ProxyContext, sock: socket.socket, watcher: Watcher, *, tls: ssl.SSLContext | None = None,
                    drain_seconds: float = 30.0, stop: asyncio.Event | None = None) -> None:
    """Serve until a signal or ``stop``; see :func:`lmdeploy.serve.lifecycle.serve`."""
    context.limits = affordable(context.limits)
    watch = asyncio.create_task(context.watch.run())
    try:
        await serve(create_app(context), sock, context.restore, watcher, tls=tls, drain_seconds=drain_seconds,
                    stop=stop)
    finally:
        watch.cancel()
        await asyncio.wait({watch})
        await context.close()


def affordable(limits: Limits) -> Limits:
    """``limits`` with no more connections than there are descriptors for: each has another to a node."""
    found = descriptors(2 * limits.connections + RESERVE)
    return replace(limits, connections=max(1, min(limits.connections, (found - RESERVE) // 2)))
