"""Which executor runs a configuration."""

from __future__ import annotations

from pathlib import Path

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.model import ModelConfig
from lmdeploy.errors import ConfigError
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.executor.process import ProcessExecutor
from lmdeploy.weights.checkpoint import Checkpoint


def make_executor(config: EngineConfig, path: Path, *, model_config: ModelConfig | None = None,
                  checkpoint: Checkpoint | None = None) -> LocalExecutor | ProcessExecutor:
    """The executor of ``config``: one rank in this process, or one process for each rank.

    Args:
        path, model_config, checkpoint: as :class:`LocalExecutor`.

    Raises:
        ConfigError: LMD-363: several ranks in one process.
    """
    if config.tp == 1:
        return LocalExecutor(config, path, model_config=model_config, checkpoint=checkpoint)
    if config.executor == 'local':
        raise ConfigError('LMD-363', tp=config.tp)
    return ProcessExecutor(config, path, model_config=model_config, checkpoint=checkpoint)
