"""``lmdeploy serve api_server``: options from the command line and a file, and the server that they describe.

Every option has one value and one origin: the command line, else ``--config``, else a variable, else its default.
``--print-config`` shows all of them. This process holds no model: it answers HTTP, and the engine runs in a child
process.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.cli.args import (
    ENGINE_OPTIONS,
    EngineOption,
    UsageError,
    add_engine_arguments,
    engine_config,
    template_config,
)
from lmdeploy.cli.screen import Screen
from lmdeploy.config import env
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig, VisionConfig

if TYPE_CHECKING:
    import socket
    import ssl

    from lmdeploy.serve.auth import KeyRing
    from lmdeploy.serve.context import ServerContext
    from lmdeploy.serve.limits import Limits
    from lmdeploy.serve.media import MediaRules
    from lmdeploy.serve.proxy.membership import Membership
    from lmdeploy.serve.remote import ProcessEngine


@dataclass(frozen=True, slots=True)
class Option:
    """A flag of the server. ``type`` is bool (a switch), list (several texts), str, int or float."""

    flag: str
    type: Any
    default: Any
    help: str
    metavar: str | None = None

    @property
    def dest(self) -> str:
        return self.flag.removeprefix('--').replace('-', '_')


OPTIONS = (
    Option('--server-name', str, '127.0.0.1', 'address to listen on; 0.0.0.0: all of this machine', 'HOST'),
    Option('--server-port', int, 23333, 'port to listen on; 0: any free one', 'PORT'),
    Option('--model-name', str, None, 'the name that requests give as model (default: MODEL as typed)', 'NAME'),
    Option('--api-keys', list, [], 'keys, one of which every request must have', 'KEY'),
    Option('--api-keys-file', str, None, 'a file with such keys, one a line', 'FILE'),
    Option('--admin-api-keys', list, [], 'keys for the administrative routes', 'KEY'),
    Option('--admin-api-keys-file', str, None, 'a file with such keys', 'FILE'),
    Option('--enable-admin', bool, False, 'administrative routes without an admin key, on a loopback address only'),
    Option('--allow-no-auth', bool, False, 'do not warn when others can reach a server without keys'),
    Option('--public-metrics', bool, False, '/metrics without a key'),
    Option('--share-prefix-cache', bool, False, 'let different keys share cached prefixes'),
    Option('--allow-origins', list, [], 'web pages that may use the server (CORS); * is any', 'ORIGIN'),
    Option('--allow-methods', list, ['*'], 'and their methods', 'METHOD'),
    Option('--allow-headers', list, ['*'], 'and their headers', 'HEADER'),
    Option('--allow-credentials', bool, False, 'and whether they may send credentials'),
    Option('--ssl', bool, False, 'TLS with the files that SSL_KEYFILE and SSL_CERTFILE name'),
    Option('--tool-call-parser', str, None, "parser of tool calls (default: the template's; none: none)", 'NAME'),
    Option('--reasoning-parser', str, None, "parser of reasoning (default: the template's; none: none)", 'NAME'),
    Option('--max-concurrent-requests', int, 0, 'answers that run at once; others wait (default: no limit)', 'N'),
    Option('--request-timeout', int, None, 'seconds for a request to be answered (default: 600)', 'SECONDS'),
    Option('--drain-timeout', float, 30.0, 'seconds for running requests to finish when the server ends', 'SECONDS'),
    Option('--limit', list, [], 'change a limit (see --print-limits)', 'NAME=VALUE'),
    Option('--audit-log', str, None, 'append one JSON line per request to this file', 'FILE'),
    Option('--audit-digests', bool, False, 'with a digest of the body in each line'),
    Option('--disable-fastapi-docs', bool, False, 'no /docs and /openapi.json'),
    Option('--no-ui', bool, False, 'no chat page at /'),
    Option('--disable-metrics', bool, False, 'no /metrics'),
    Option('--allow-terminate-by-client', bool, False, 'POST /terminate shuts the server down (administrative)'),
    Option('--log-level', str, None, 'ERROR, WARNING, INFO or DEBUG (default: WARNING)', 'LEVEL'),
    Option('--log-format', str, 'text', 'text or json', 'FORMAT'),
    Option('--max-log-len', int, None, 'accepted; prompts are never logged', 'N'),
    Option('--vision-max-batch-size', int, 1, 'pictures that a step encodes at most (1: as many as fit)', 'N'),
    Option('--disable-media-url', bool, False, 'take pictures as data only, and fetch none'),
    Option('--allowed-media-domains', list, [], 'fetch pictures from these hosts only; .suffix: all below it', 'HOST'),
    Option('--allowed-media-networks', list, [], 'fetch pictures from these addresses too, though not public', 'CIDR'),
    Option('--allowed-local-media-path', str, None, 'read file: URLs of pictures below this folder', 'FOLDER'),
    Option('--trust-remote-code', bool, False, 'accepted; code in a model folder is never run'),
    Option('--proxy-url', str, None, 'register at the proxy with this address', 'URL'),
    Option('--node-key', str, None, 'the key of that proxy for nodes (better: LMDEPLOY_NODE_KEY)', 'KEY'),
    Option('--node-url', str, None, 'where that proxy reaches this server (default: its own address)', 'URL'),
)
ENVIRONMENT: dict[str, tuple[str, Callable[[], Any]]] = {
    'api_keys': ('LMDEPLOY_API_KEYS', env.api_keys), 'node_key': ('LMDEPLOY_NODE_KEY', env.node_key),
    'log_level': ('LMDEPLOY_LOG_LEVEL', env.log_level)}
"""Options that a variable gives where nothing else does."""
HINTS = ('max_log_len', 'trust_remote_code')
ALL_ENGINE_OPTIONS = (
    *ENGINE_OPTIONS,
    EngineOption('--dp', 'dp', 'dp', int, 'only 1'),
    EngineOption('--ep', 'ep', 'ep', int, 'only 1'),
    EngineOption('--cp', 'cp', None, int, 'only 1'),
    EngineOption('--nnodes', 'nnodes', None, int, 'only 1'),
    EngineOption('--node-rank', 'node_rank', None, int, 'only 0'),
    EngineOption('--dist-init-addr', 'dist_init_addr', None, str, 'not supported'),
    EngineOption('--num-tokens-per-iter', 'num_tokens_per_iter', None, int, 'a hint'),
    EngineOption('--max-prefill-iters', 'max_prefill_iters', None, int, 'a hint'),
    EngineOption('--enable-microbatch', None, 'enable_microbatch', bool, 'not supported'),
    EngineOption('--enable-eplb', None, 'enable_eplb', bool, 'not supported'),
    EngineOption('--role', None, 'role', str, 'only Hybrid'),
    EngineOption('--migration-backend', None, 'migration_backend', str, 'a hint'),
    EngineOption('--distributed-executor-backend', None, 'distributed_executor_backend', str, 'uni'),
    EngineOption('--num-gpu-blocks', None, 'num_gpu_blocks', int, 'blocks of the KV cache'),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model_path', nargs='?', metavar='MODEL',
                        help='a folder, a .gguf file, a short name (see lmdeploy list) or a hub id')
    group = parser.add_argument_group('server')
    for option in OPTIONS:
        kind: dict[str, Any] = {'type': option.type, 'metavar': option.metavar}
        if option.type is bool:
            kind = {'action': 'store_true'}
        elif option.type is list:
            kind = {'nargs': '+', 'metavar': option.metavar}
        group.add_argument(option.flag, dest=option.dest, default=argparse.SUPPRESS, help=option.help, **kind)
    group.add_argument('--config', default=None, metavar='FILE', help='options from a YAML or JSON file')
    group.add_argument('--print-config', action='store_true', help='show every option, its value and its origin')
    group.add_argument('--print-limits', action='store_true', help='show every limit')
    add_engine_arguments(parser, ALL_ENGINE_OPTIONS)


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.serve.lifecycle import bind
    from lmdeploy.serve.logs import configure

    origins = merge(args)
    limits = _limits(args)
    if args.print_limits:
        print('\n'.join(limits.lines()))
    if args.print_config:
        print('\n'.join(f'{name:<32} {value!r:<28} {origin}' for name, value, origin in origins))
    if args.print_limits or args.print_config:
        return 0
    if not args.model_path:
        raise UsageError('LMD-412')
    configure(args.log_level or env.log_level() or 'WARNING', args.log_format)
    screen = replace(screen, as_json=args.log_format == 'json')
    _check(args)
    for name in HINTS:
        if (name, 'default') not in {(option, origin) for option, _, origin in origins}:
            screen.note('serve_hint', flag=f'--{name.replace("_", "-")}')
    keys, tls = _keys(args), _tls(args)
    sock = bind(args.server_name, args.server_port)  # before anything is loaded: a busy port is found at once
    with sock:
        return _serve(args, screen, limits, keys, tls, sock)


def merge(args: argparse.Namespace) -> list[tuple[str, Any, str]]:
    """Complete ``args`` from ``--config`` and the defaults; returns ``(option, value, origin)`` of every option.

    Raises:
        UsageError: LMD-410, the file cannot be read; LMD-411, an option of it is unknown or of the wrong type.
    """
    path = args.config
    chosen = _read(path) if path else {}
    types = {option.dest: option.type for option in (*OPTIONS, *ALL_ENGINE_OPTIONS)}
    types |= {'backend': str, 'chat_template': str, 'model_path': str}
    for name, value in chosen.items():
        if name not in types or not _fits(value, types[name]):
            raise UsageError('LMD-411', path=path, name=name, value=repr(value)[:80])
    defaults = {option.dest: option.default for option in OPTIONS}
    found: list[tuple[str, Any, str]] = []
    for name in types:
        given = getattr(args, name, None) if name in ('backend', 'chat_template', 'model_path') else getattr(
            args, name, ...)
        if given is not ... and not (given is None and name in chosen):
            origin = 'default' if given is None else 'command line'
            found.append((name, _shown(name, given), origin))
        elif name in chosen:
            value = chosen[name]
            setattr(args, name, [str(v) for v in value] if types[name] is list else value)
            found.append((name, _shown(name, value), str(path)))
        elif name in defaults:
            setattr(args, name, defaults[name])
            variable, value = ENVIRONMENT.get(name, ('', lambda: None))
            found.append((name, _shown(name, value()), variable) if value() else (name, defaults[name], 'default'))
        else:
            found.append((name, _engine_default(name), 'default'))
    return found


def _engine_default(name: str) -> Any:
    """The value of an engine option that nobody gave: that of the config which has it."""
    option = next((option for option in ALL_ENGINE_OPTIONS if option.dest == name), None)
    if option is None:
        return None
    if option.turbomind is not None:
        return getattr(TurbomindEngineConfig(), option.turbomind)
    return None if option.pytorch is None else getattr(PytorchEngineConfig(), option.pytorch)


def _shown(name: str, value: Any) -> Any:
    """A value as it is printed: no key ever is."""
    return '***' if name == 'node_key' or ('keys' in name and isinstance(value, list)) else value


def _read(path: str) -> dict[str, Any]:
    """The options in a file: names as on the command line, with or without dashes in front."""
    import yaml

    try:  # JSON is YAML
        value = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError('LMD-410', path=path, reason=f'{type(error).__name__}: {error}') from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UsageError('LMD-410', path=path, reason='it must hold options as NAME: VALUE')
    return {name.lstrip('-').replace('-', '_'): given for name, given in value.items()}


def _fits(value: Any, kind: Any) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(one, (str, int)) for one in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (str, bool):
        return isinstance(value, kind)
    return isinstance(value, (int, float)) and not isinstance(value, bool)  # whole numbers, shares of the memory


def _limits(args: argparse.Namespace) -> Limits:
    from lmdeploy.serve.limits import Limits

    limits = Limits().change(args.limit)
    if args.request_timeout is None:
        return limits
    return limits.change([f'request_seconds={args.request_timeout}'])


def _check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before the port is taken.

    Raises:
        ConfigError: LMD-527 and others.
    """
    from lmdeploy.errors import ConfigError
    from lmdeploy.serve.parsers import reasoning_parser, tool_parser

    if args.tool_call_parser not in (None, 'none'):
        tool_parser(args.tool_call_parser)
    if args.reasoning_parser not in (None, 'none'):
        reasoning_parser(args.reasoning_parser)
    if args.proxy_url is not None:
        from lmdeploy.serve.fetch import Address

        Address.parse(args.proxy_url)
        if not (args.node_key or env.node_key()):
            raise ConfigError('LMD-527', option='--proxy-url', value=args.proxy_url,
                              reason='the proxy takes no server without its node key; set LMDEPLOY_NODE_KEY')
    if '*' in args.allow_origins and args.allow_credentials:
        raise ConfigError('LMD-527', option='--allow-credentials', value=True,
                          reason='with --allow-origins "*" every page could act for its reader; name the origins')
    if args.max_concurrent_requests is not None and args.max_concurrent_requests < 0:
        raise ConfigError('LMD-527', option='--max-concurrent-requests', value=args.max_concurrent_requests,
                          reason='it must be a number from 0')
    if not 0 <= args.drain_timeout < 1e6:
        raise ConfigError('LMD-527', option='--drain-timeout', value=args.drain_timeout,
                          reason='it must be a number of seconds from 0')


def _media(args: argparse.Namespace) -> MediaRules:
    """Where pictures may come from.

    Raises:
        ConfigError: LMD-527.
    """
    from ipaddress import ip_network

    from lmdeploy.errors import ConfigError
    from lmdeploy.serve.media import MediaRules

    networks = []
    for text in args.allowed_media_networks:
        try:
            networks.append(ip_network(text))
        except ValueError:
            raise ConfigError('LMD-527', option='--allowed-media-networks', value=text,
                              reason='it must be an address, or a network such as 10.0.0.0/8') from None
    folder = None if args.allowed_local_media_path is None else Path(args.allowed_local_media_path).resolve()
    if folder is not None and not folder.is_dir():
        raise ConfigError('LMD-527', option='--allowed-local-media-path', value=args.allowed_local_media_path,
                          reason='it must be a folder')
    return MediaRules(not args.disable_media_url, tuple(name.lower() for name in args.allowed_media_domains),
                      tuple(networks), folder)


def _keys(args: argparse.Namespace) -> KeyRing:
    from lmdeploy.serve.auth import KeyRing, read_keys

    user = [*args.api_keys, *env.api_keys()]
    admin = [*args.admin_api_keys]
    if args.api_keys_file:
        user += read_keys(args.api_keys_file, '--api-keys-file')
    if args.admin_api_keys_file:
        admin += read_keys(args.admin_api_keys_file, '--admin-api-keys-file')
    return KeyRing(user, admin, enable_admin=args.enable_admin)


def _tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    if not args.ssl:
        return None
    from lmdeploy.serve.lifecycle import tls_context

    return tls_context(*env.tls_files())


def _serve(args: argparse.Namespace, screen: Screen, limits: Limits, keys: KeyRing, tls: ssl.SSLContext | None,
           sock: socket.socket) -> int:
    from lmdeploy.config.options import normalise
    from lmdeploy.errors import ConfigError
    from lmdeploy.hub.resolve import resolve
    from lmdeploy.serve.audit import AuditLog
    from lmdeploy.serve.context import ServerContext
    from lmdeploy.serve.lifecycle import is_loopback
    from lmdeploy.serve.middleware import Cors
    from lmdeploy.serve.remote import ProcessEngine

    public, template = engine_config(args, ALL_ENGINE_OPTIONS), template_config(args)
    vision = VisionConfig(max_batch_size=args.vision_max_batch_size)
    config, loopback = normalise(public, vision), is_loopback(sock)
    if args.enable_admin and not loopback and not keys.required:
        raise ConfigError('LMD-527', option='--enable-admin', value=True,
                          reason='on an address that others can reach, administrative routes need --admin-api-keys')
    if not loopback and not keys.required and not args.allow_no_auth:
        screen.note('serve_no_auth', host=args.server_name)
    files = resolve(args.model_path, revision=public.revision, download_dir=public.download_dir)
    engine = ProcessEngine(config, files.path, template)
    audit = AuditLog(args.audit_log, digests=args.audit_digests) if args.audit_log else None
    stop = asyncio.Event()
    context = ServerContext(
        model_names=(args.model_name or args.model_path,), engine=engine, keys=keys, limits=limits,
        cors=Cors(tuple(args.allow_origins), tuple(args.allow_methods), tuple(args.allow_headers),
                  args.allow_credentials),
        tool_parser=args.tool_call_parser, reasoning_parser=args.reasoning_parser, check_host=loopback,
        public_metrics=args.public_metrics, docs=not args.disable_fastapi_docs, page=not args.no_ui,
        expose_metrics=not args.disable_metrics, share_prefix_cache=args.share_prefix_cache,
        max_concurrent_requests=args.max_concurrent_requests or 0, audit=audit, media_rules=_media(args),
        terminate=stop.set if args.allow_terminate_by_client else None)
    scheme = 'https' if tls is not None else 'http'
    host = args.server_name if ':' not in args.server_name else f'[{args.server_name}]'
    url = f'{scheme}://{host}:{sock.getsockname()[1]}'
    screen.note('serve_loading', model=args.model_path, url=url)
    try:
        asyncio.run(_run(context, engine, sock, tls, stop, args.drain_timeout, screen, url,
                         _membership(args, context, screen, sock, scheme)))
    finally:
        if audit is not None:
            audit.close()
    return 0


async def _run(context: ServerContext, engine: ProcessEngine, sock: socket.socket, tls: ssl.SSLContext | None,
               stop: asyncio.Event, drain_seconds: float, screen: Screen, url: str, member: Membership | None) -> None:
    from lmdeploy.serve.lifecycle import Watcher, serve
    from lmdeploy.serve.openai.api_server import create_app

    tasks: list[asyncio.Task[None]] = []

    def ready() -> None:
        _banner(context, screen, url)
        if member is not None:
            tasks.append(asyncio.create_task(member.run()))

    def draining() -> None:
        screen.note('serve_draining', seconds=drain_seconds)
        if member is not None:  # before requests are turned away, so that the proxy sends none that would be
            tasks.append(asyncio.create_task(member.leave()))

    watcher = Watcher(ready=ready, stats=screen.line, draining=draining)
    try:
        await serve(create_app(context), sock, engine.load, watcher, tls=tls, drain_seconds=drain_seconds, stop=stop)
    finally:
        for task in tasks:
            task.cancel()
        if member is not None:
            await member.close()
        await engine.close()


def _membership(args: argparse.Namespace, context: ServerContext, screen: Screen, sock: socket.socket,
                scheme: str) -> Membership | None:
    """What keeps this server registered at ``--proxy-url``; the proxy may then speak for its callers."""
    if args.proxy_url is None:
        return None
    from lmdeploy.serve.fetch import Address
    from lmdeploy.serve.proxy.membership import Membership, reachable_url

    key = args.node_key or env.node_key()
    assert key is not None, 'checked with the other options'
    proxy = Address.parse(args.proxy_url)
    url = args.node_url or reachable_url(scheme, args.server_name, sock.getsockname()[1], proxy)
    member = Membership(proxy, key, url, context.model_names,
                        joined=lambda: screen.note('proxy_joined', proxy=proxy.url, url=url))
    context.keys.trust_proxy(member.api_key)
    return member


def _banner(context: ServerContext, screen: Screen, url: str) -> None:
    """Printed once, when the first request can be answered."""
    capacity = context.frontend_loaded().capacity
    model = context.model_names[0]
    key = ' -H "Authorization: Bearer $KEY"' if context.keys.required else ''
    encoder = capacity.pooling is not None
    path, what = ('embeddings', '"input": "Hello"') if encoder else (
        'chat/completions', '"messages": [{"role": "user", "content": "Hello"}]')
    curl = f"""curl {url}/v1/{path} -H "Content-Type: application/json"{key} -d '{{"model": "{model}", {what}}}'"""
    names, docs = ', '.join(context.model_names), f'{url}/docs' if context.docs else '-'
    if encoder:
        screen.note('serve_ready_embeddings', models=names, url=url, docs=docs, session_len=capacity.session_len,
                    batch=capacity.max_batch_size, keys=len(context.keys))
    else:
        screen.note('serve_ready', models=names, url=url, page=f'{url}/' if context.page else '-', docs=docs,
                    session_len=capacity.session_len, kv_tokens=capacity.num_blocks * capacity.block_size,
                    kv_gib=capacity.kv_bytes / 2**30, cache=capacity.choices.get('cache', ''),
                    batch=capacity.max_batch_size, keys=len(context.keys))
    screen.line(curl)
