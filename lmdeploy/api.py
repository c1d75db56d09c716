"""pipeline(): from a model's name to a Pipeline, and the one place where its parts are put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmdeploy import log
from lmdeploy.config.options import PublicConfig, log_level_of, normalise
from lmdeploy.messages import PytorchEngineConfig, VisionConfig

if TYPE_CHECKING:
    from lmdeploy.executor.base import Capacity
    from lmdeploy.model import ChatTemplateConfig
    from lmdeploy.pipe import Pipeline


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
        vision_config: accepted for models that read text only.
        trust_remote_code: accepted, with a warning: code in a model's folder is never run.

    Raises:
        SourceError, ConfigError, LoadError, TemplateError: what is wrong with the model or an option, before its
            weights load.
    """
    log.set_level(log_level_of(log_level))
    logger = log.get_logger()
    if trust_remote_code:
        logger.warning('trust_remote_code changes nothing: code in a model folder is never run')
    config = normalise(backend_config)

    from lmdeploy.chat import resolve_template
    from lmdeploy.engine.client import ThreadClient
    from lmdeploy.engine.core import EngineCore
    from lmdeploy.executor.local import LocalExecutor
    from lmdeploy.frontend.frontend import AsyncFrontend
    from lmdeploy.hub.resolve import resolve
    from lmdeploy.pipe import Pipeline
    from lmdeploy.tokenizer import Tokenizer

    files = resolve(model_path, revision=getattr(backend_config, 'revision', None),
                    download_dir=getattr(backend_config, 'download_dir', None))
    executor = LocalExecutor(config, files.path)
    tokenizer = Tokenizer(str(files.path))
    template = resolve_template(str(files.path), tokenizer, chat_template_config)
    capacity = executor.start()
    core = EngineCore(executor, capacity, depth=config.depth or 1, prefix_caching=config.prefix_caching)
    client = ThreadClient(core)

    def stop() -> None:
        client.close()
        executor.stop()

    frontend = AsyncFrontend(client, tokenizer, template, capacity, executor.model_config.context_len)
    logger.info(start_line(capacity))
    return Pipeline(frontend, model_name=model_name or model_path, stop=stop,
                    backend='pytorch' if isinstance(backend_config, PytorchEngineConfig) else 'turbomind',
                    backend_config=backend_config)


def start_line(capacity: Capacity) -> str:
    """One line that says what really runs."""
    chosen: dict[str, Any] = dict(capacity.choices)
    runner = chosen.pop('runner', 'eager')
    parts = [f'{runner} runner on {capacity.device}', *(f'{what} {how}' for what, how in chosen.items())]
    tokens = capacity.num_blocks * capacity.block_size
    parts.append(f'{tokens:,} tokens of KV cache ({capacity.kv_bytes / 2**30:.1f} GiB)')
    parts.append(f'batch {capacity.max_batch_size}, session {capacity.session_len}')
    return 'engine: ' + ', '.join(parts)
