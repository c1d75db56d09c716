"""LocalExecutor: one rank, in this process and thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.model import ModelConfig
from lmdeploy.config.quantization import check_model_format
from lmdeploy.engine.plan import StepPlan
from lmdeploy.executor.base import Capacity
from lmdeploy.parallel.group import ALONE, Group
from lmdeploy.runner.graphs import GraphStep, Record
from lmdeploy.runner.handle import Launched
from lmdeploy.runner.mixed import MixedStep
from lmdeploy.runner.model_runner import ModelRunner
from lmdeploy.weights.checkpoint import Checkpoint
from lmdeploy.weights.dummy import read_config


class LocalExecutor:
    """Implements :class:`~lmdeploy.executor.base.Executor`. A step on a CPU has run when ``launch`` returns.

    Args:
        engine_config: what the user asked for.
        model_files_path: model folder or ``.gguf`` file.
        model_config, checkpoint: those of the path, where they are open already.
        record, group: see :class:`ModelRunner`.
    """

    def __init__(self, engine_config: EngineConfig, model_files_path: Path, *, model_config: ModelConfig | None = None,
                 checkpoint: Checkpoint | None = None, record: Record | None = None, group: Group = ALONE) -> None:
        self._given = engine_config, model_files_path, checkpoint
        self._runner = ModelRunner(engine_config, model_files_path, model_config=model_config, checkpoint=checkpoint,
                                   record=record, group=group)

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape; after :meth:`start`."""
        return self._runner.model_config

    @property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's generation_config.json, or ``{}``; after :meth:`start`."""
        return self._runner.generation_config

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations; after :meth:`start`."""
        return self._runner.dtype

    def start(self) -> Capacity:
        """See :meth:`ModelRunner.start`.

        Raises:
            ConfigError: LMD-229: the weights are not stored as ``model_format`` says.
        """
        engine, path, checkpoint = self._given
        if engine.model_format is not None:
            values = checkpoint.config if checkpoint is not None else read_config(path) if path.is_dir() else {}
            check_model_format(engine.model_format, values)
        runner = self._runner
        runner.start()
        return Capacity(
            num_blocks=runner.plan.num_blocks,
            block_size=runner.kv.block_size,
            max_batch_size=runner.plan.max_batch_size,
            max_step_tokens=runner.plan.max_step_tokens,
            session_len=runner.plan.session_len,
            vocab_size=runner.model_config.vocab_size,
            kv_bytes=runner.kv.nbytes,
            device=runner.device.type,
            choices=runner.choices(),
            pictures=runner.picture_room,
        )

    def launch(self, plan: StepPlan) -> Launched | GraphStep | MixedStep:
        """Start a step; what it raises at once, it raises here."""
        return self._runner.run(plan)

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a method of the runner; a list of one."""
        return [getattr(self._runner, name)(*args)]

    def stop(self) -> None:
        """Release the model and its cache; safe to call twice."""
        self._runner.stop()
