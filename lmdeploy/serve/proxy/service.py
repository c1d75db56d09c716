"""A proxy from its port to its end."""

from __future__ import annotations

import asyncio
import socket
import ssl

from lmdeploy.serve.lifecycle import Watcher, serve
from lmdeploy.serve.proxy.app import create_app
from lmdeploy.serve.proxy.context import ProxyContext


async def run_proxy(context: ProxyContext, sock: socket.socket, watcher: Watcher, *, tls: ssl.SSLContext | None = None,
                    drain_seconds: float = 30.0, stop: asyncio.Event | None = None) -> None:
    """Serve until a signal or ``stop``; see :func:`lmdeploy.serve.lifecycle.serve`."""
    watch = asyncio.create_task(context.watch.run())
    try:
        await serve(create_app(context), sock, context.restore, watcher, tls=tls, drain_seconds=drain_seconds,
                    stop=stop)
    finally:
        watch.cancel()
        await asyncio.wait({watch})
        await context.close()
