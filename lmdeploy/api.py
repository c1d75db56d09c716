"""pipeline(), serve() and client(): from a model's name to answers, here or behind a server.

This is the one place where the parts of a pipeline are put together.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from lmdeploy import log
from lmdeploy.config.options import PublicConfig, log_level_of, normalise
from lmdeploy.errors import ConfigError
from lmdeploy.messages import PytorchEngineConfig, VisionConfig

if TYPE_CHECKING:
    from lmdeploy.executor.base import Capacity
    from lmdeploy.model import ChatTemplateConfig
    from lmdeploy.pipe import Pipeline
    from lmdeploy.serve.launch import ServingClient
    from lmdeploy.serve.openai.api_client import APIClient


def pipeline(model_path: str, backend_config: PublicConfig | None = None,
             chat_template_config: ChatTemplateConfig | None = None, log_level: str = 'WARNING',
             max_log_len: int | None = None, *, model_name: str | None = None,
             vision_config: VisionConfig | None = None, trust_remote_code: bool = False) -> Pipeline:
    """Load a model and return a :class:`lmdeploy.Pipeline` that answers prompts.

    Args:
        model_path: a local folder, a ``.gguf`` file, an alias (``'smollm2:135m'``), or the id of a model on a hub.
        backend_config: engine options; None: ``TurbomindEngineConfig()``.
        chat_template_config: a chat template by name or in parts; None: the model's own.
        log_level: of the package's logger.
        max_log_len: accepted; prompts are never logged.
        model_name: the name that the model goes by; None: ``model_path`` as typed.
        vision_config: options of the vision encoder; accepted for models that read text only.
        trust_remote_code: accepted, with a warning: code in a model's folder is never run.

    Raises:
        SourceError, ConfigError, LoadError, TemplateError: what is wrong with the model or an option, before its
            weights load.
    """
    log.set_level(log_level_of(log_level))
    logger = log.get_logger()
    if trust_remote_code:
        logger.warning('trust_remote_code changes nothing: code in a model folder is never run')
    config = normalise(backend_config, vision_config)

    from lmdeploy.chat import resolve_template
    from lmdeploy.config.encoder import refuse_encoder
    from lmdeploy.engine.client import ThreadClient
    from lmdeploy.engine.core import EngineCore
    from lmdeploy.executor.choice import make_executor
    from lmdeploy.frontend.frontend import AsyncFrontend
    from lmdeploy.frontend.pictures import pictures_of
    from lmdeploy.hub.resolve import resolve
    from lmdeploy.pipe import Pipeline
    from lmdeploy.tokenizer import Tokenizer
    from lmdeploy.weights.checkpoint import open_checkpoint

    files = resolve(model_path, revision=getattr(backend_config, 'revision', None),
                    download_dir=getattr(backend_config, 'download_dir', None))
    refuse_encoder(files.path)
    made_up = config.load_format == 'dummy'
    # every header is sound before anything else is read
    with nullcontext() if made_up else open_checkpoint(files.path) as checkpoint:
        executor = make_executor(config, files.path, checkpoint=checkpoint)
        tokenizer = Tokenizer(str(files.path))
        template = resolve_template(str(files.path), tokenizer, chat_template_config)

        def build() -> EngineCore:
            capacity = executor.start()
            return EngineCore(executor, capacity, depth=config.depth_on(capacity.device),
                              prefix_caching=config.prefix_caching)

        client = ThreadClient(build)
    capacity = client.capacity

    def stop() -> None:
        client.close()
        executor.stop()

    frontend = AsyncFrontend(client, tokenizer, template, capacity, executor.model_config.context_len,
                             pictures=pictures_of(files.path, tokenizer, capacity))
    logger.info(start_line(capacity))
    return Pipeline(frontend, model_name=model_name or model_path, stop=stop,
                    backend='pytorch' if isinstance(backend_config, PytorchEngineConfig) else 'turbomind',
                    backend_config=backend_config)


def start_line(capacity: Capacity) -> str:
    """One line that says what really runs."""
    chosen: dict[str, Any] = dict(capacity.choices)
    runner, cache = chosen.pop('runner', 'eager'), chosen.pop('cache', '')
    parts = [f'{runner} runner on {capacity.device}', *(f'{what} {how}' for what, how in chosen.items())]
    tokens = capacity.num_blocks * capacity.block_size
    parts.append(f'{tokens:,} tokens of {cache} KV cache ({capacity.kv_bytes / 2**30:.1f} GiB)')
    parts.append(f'batch {capacity.max_batch_size}, session {capacity.session_len}')
    return 'engine: ' + ', '.join(parts)


def serve(model_path: str, model_name: str | None = None, backend: Literal['turbomind', 'pytorch'] = 'turbomind',
          backend_config: PublicConfig | None = None, chat_template_config: ChatTemplateConfig | None = None,
          server_name: str = '127.0.0.1', server_port: int = 23333, log_level: str = 'ERROR',
          api_keys: list[str] | str | None = None, ssl: bool = False) -> ServingClient:
    """Start ``lmdeploy serve api_server`` as a child process, wait until it serves, and return a client of it.

    The server ends with :meth:`ServingClient.close`, at the end of a ``with`` block, or with this program. Scripts need
    no ``if __name__ == '__main__':`` guard.

    Args:
        model_path: as for :func:`pipeline`; also the model's name in requests, unless ``model_name`` is given.
        backend: under whose names the engine is configured; the type of ``backend_config`` goes before it.
        chat_template_config: a chat template by name or in parts. The server does not know templates that only this
            program has registered.
        server_name: the address to listen on; ``'0.0.0.0'``: all of this machine.
        server_port: 0: any free one, see the client's ``api_server_url``.
        log_level: of the server, which logs to stderr.
        api_keys: a list, or text with commas; None: those of ``LMDEPLOY_API_KEYS``, if any. The client has the first.
        ssl: TLS with the files that ``SSL_KEYFILE`` and ``SSL_CERTFILE`` name; the client trusts that certificate.

    Raises:
        ConfigError: LMD-501, the port is in use; LMD-503, the TLS files are not usable; LMD-585, an engine option that
            the server has no flag for; LMD-586, a key with a comma.
        LmdeployError: whatever else the server says is wrong with the model or an option.
    """
    from lmdeploy.cli.command import engine_flags, template_flags
    from lmdeploy.config import env
    from lmdeploy.serve.launch import ServerProcess, ServingClient, trust
    from lmdeploy.serve.lifecycle import bind, tls_context

    if isinstance(api_keys, str):
        api_keys = [key.strip() for key in api_keys.split(',') if key.strip()]
    keys = api_keys or env.api_keys()
    if any(mark in key for key in keys for mark in ',\r\n'):
        raise ConfigError('LMD-586')
    flags = ['--backend', backend] if backend_config is None else engine_flags(backend_config)
    flags += template_flags(chat_template_config)
    flags += ['--model-name', model_name] if model_name is not None else []
    tls = None
    if ssl:
        flags.append('--ssl')
        tls_context(*env.tls_files())
        tls = trust(env.tls_files()[1])
    with bind(server_name, server_port) as sock:  # a server of another program must not be taken for this one
        port = sock.getsockname()[1]
    process = ServerProcess(['serve', 'api_server', model_path, '--server-name', server_name, '--server-port',
                             str(port), '--log-level', log_level, '--drain-timeout', '5', *flags], keys)
    host = f'[{server_name}]' if ':' in server_name else server_name
    client = ServingClient(process, f'http{"s" if ssl else ""}://{host}:{port}', keys[0] if keys else None, tls=tls)
    try:
        client.wait()
    except BaseException:
        client.close()
        raise
    return client


def client(api_server_url: str = 'http://0.0.0.0:23333', api_key: str | None = None) -> APIClient:
    """A client of a running server; see :class:`lmdeploy.serve.openai.api_client.APIClient`.

    Raises:
        ConfigError: LMD-581, the address is none.
    """
    from lmdeploy.serve.openai.api_client import APIClient

    return APIClient(api_server_url, api_key)
