"""``lmdeploy serve proxy``: options, and the proxy that they describe."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from typing import TYPE_CHECKING

from lmdeploy.cli.screen import Screen
from lmdeploy.config import env

if TYPE_CHECKING:
    import socket
    import ssl

    from lmdeploy.serve.proxy.context import ProxyContext

STRATEGIES = ('random', 'min_expected_latency', 'min_observed_latency', 'prefix_affinity')
HINTS = {'migration_protocol': 'RDMA', 'link_type': 'RoCE', 'disable_gdr': False}
"""LMDeploy's options for nodes that divide a request among them, and their defaults; there are no such nodes here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('proxy')

    def option(flag: str, help: str, **kind: object) -> None:
        group.add_argument(flag, help=help, **kind)  # type: ignore[arg-type]

    def switch(flag: str, help: str) -> None:
        group.add_argument(flag, help=help, action='store_true')

    option('--server-name', 'address to listen on; 0.0.0.0: all of this machine', default='127.0.0.1', metavar='HOST')
    option('--server-port', 'port to listen on; 0: any free one', type=int, default=8000, metavar='PORT')
    option('--routing-strategy', 'which node gets a request (default: min_expected_latency)', choices=STRATEGIES,
           default='min_expected_latency')
    option('--serving-strategy', 'only Hybrid: a node reads prompts and writes answers',
           choices=('Hybrid', 'DistServe'), default='Hybrid')
    option('--node-key', 'with which nodes register (default: LMDEPLOY_NODE_KEY, else a new one, which is printed)',
           metavar='KEY')
    option('--node-api-key', 'what the proxy shows to nodes that gave it no key of their own', metavar='KEY')
    option('--allowed-nodes', 'where nodes may be: networks, addresses, names (default: loopback, private networks)',
           nargs='+', default=[], metavar='NETWORK')
    option('--api-keys', 'keys, one of which every request must have', nargs='+', default=[], metavar='KEY')
    option('--api-keys-file', 'a file with such keys, one a line', metavar='FILE')
    switch('--allow-no-auth', 'do not warn when others can reach a proxy without keys')
    option('--heartbeat-seconds', "between two questions for a node's health (default: 10)", type=float, default=10.0,
           metavar='SECONDS')
    option('--node-timeout', 'seconds without a byte of a stream after which its node is given up (default: 120)',
           type=float, default=120.0, metavar='SECONDS')
    option('--request-timeout', 'seconds for a request to be answered (default: 600)', type=int, metavar='SECONDS')
    option('--drain-timeout', 'seconds for running requests to finish when the proxy ends (default: 30)', type=float,
           default=30.0, metavar='SECONDS')
    option('--limit', 'change a limit (see lmdeploy serve api_server --print-limits)', nargs='+', default=[],
           metavar='NAME=VALUE')
    switch('--disable-cache-status', 'do not remember the nodes from one start to the next')
    switch('--public-metrics', '/metrics without a key')
    switch('--disable-fastapi-docs', 'no /docs and /openapi.json')
    switch('--ssl', 'TLS with the files that SSL_KEYFILE and SSL_CERTFILE name')
    option('--allow-origins', 'web pages that may use the proxy (CORS); * is any', nargs='+', default=[],
           metavar='ORIGIN')
    option('--log-level', 'ERROR, WARNING, INFO or DEBUG (default: WARNING)', metavar='LEVEL')
    option('--log-format', 'text or json', choices=('text', 'json'), default='text')
    option('--migration-protocol', 'accepted, without effect', choices=('RDMA', 'NVLINK'), default='RDMA')
    option('--link-type', 'accepted, without effect', choices=('RoCE', 'IB'), default='RoCE')
    switch('--disable-gdr', 'accepted, without effect')


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.errors import ConfigError
    from lmdeploy.serve.lifecycle import bind, tls_context
    from lmdeploy.serve.logs import configure

    configure(args.log_level or env.log_level() or 'WARNING', args.log_format)
    if args.serving_strategy != 'Hybrid':
        raise ConfigError('LMD-527', option='--serving-strategy', value=args.serving_strategy,
                          reason='nodes that only read prompts or only write answers are not supported')
    for option, value in (('--heartbeat-seconds', args.heartbeat_seconds), ('--node-timeout', args.node_timeout)):
        if not 0 < value < 1e9:
            raise ConfigError('LMD-527', option=option, value=value, reason='it must be a positive number of seconds')
    for name, default in HINTS.items():
        if getattr(args, name) != default:
            screen.note('serve_hint', flag=f'--{name.replace("_", "-")}')
    given = args.node_key or env.node_key()
    key = given or secrets.token_urlsafe(24)
    context = _context(args, key)
    tls = tls_context(*env.tls_files()) if args.ssl else None
    with bind(args.server_name, args.server_port) as sock:
        return _serve(args, screen, context, None if given else key, tls, sock)


def _context(args: argparse.Namespace, node_key: str) -> ProxyContext:
    from lmdeploy.serve.auth import read_keys
    from lmdeploy.serve.limits import Limits
    from lmdeploy.serve.middleware import Cors
    from lmdeploy.serve.proxy.addresses import AllowedNodes
    from lmdeploy.serve.proxy.context import ProxyContext, ProxyKeys

    keys = [*args.api_keys, *env.api_keys()]
    if args.api_keys_file:
        keys += read_keys(args.api_keys_file, '--api-keys-file')
    limits = Limits().change(args.limit)
    if args.request_timeout is not None:
        limits = limits.change([f'request_seconds={args.request_timeout}'])
    return ProxyContext(
        ProxyKeys(keys, node_key), AllowedNodes(args.allowed_nodes), limits, Cors(origins=tuple(args.allow_origins)),
        strategy=args.routing_strategy, node_api_key=args.node_api_key, heartbeat_seconds=args.heartbeat_seconds,
        silence_seconds=args.node_timeout, public_metrics=args.public_metrics, docs=not args.disable_fastapi_docs)


def _serve(args: argparse.Namespace, screen: Screen, context: ProxyContext, new_key: str | None,
           tls: ssl.SSLContext | None, sock: socket.socket) -> int:
    from lmdeploy.serve.lifecycle import Watcher, is_loopback
    from lmdeploy.serve.proxy.service import run_proxy
    from lmdeploy.serve.proxy.state import StateFile, default_path

    context.check_host = is_loopback(sock)
    if not is_loopback(sock) and not context.keys.required and not args.allow_no_auth:
        screen.note('serve_no_auth', host=args.server_name)
    if args.server_port and not args.disable_cache_status:
        context.state = StateFile(default_path(args.server_port))
    host = args.server_name if ':' not in args.server_name else f'[{args.server_name}]'
    url = f'{"http" if tls is None else "https"}://{host}:{sock.getsockname()[1]}'

    def ready() -> None:
        if new_key is not None:
            screen.note('proxy_key', key=new_key)
        screen.note('proxy_ready', url=url, strategy=context.strategy, keys=len(context.keys), nodes=len(context.nodes))
        screen.line(f'lmdeploy serve api_server MODEL --proxy-url {url}')

    watcher = Watcher(ready=ready, stats=screen.line,
                      draining=lambda: screen.note('serve_draining', seconds=args.drain_timeout))
    asyncio.run(run_proxy(context, sock, watcher, tls=tls, drain_seconds=args.drain_timeout))
    return 0
