"""EncoderExecutor: an encoder on one rank, in this process and thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.plan import StepPlan
from lmdeploy.executor.base import Capacity
from lmdeploy.runner.handle import Launched
from lmdeploy.runner.text_encoder import TextEncoder


class EncoderExecutor:
    """Implements :class:`~lmdeploy.executor.base.Executor` for plans of whole texts
    (:class:`lmdeploy.engine.pooled.PooledScheduler` makes them).

    Args:
        engine_config: what the user asked for.
        model_files_path: model folder.
    """

    def __init__(self, engine_config: EngineConfig, model_files_path: Path) -> None:
        self._encoder = TextEncoder(engine_config, model_files_path)

    @property
    def context_len(self) -> int:
        """The most tokens that the model has positions for; after :meth:`start`."""
        return self._encoder.config.context_len

    def start(self) -> Capacity:
        """See :meth:`TextEncoder.start`."""
        encoder = self._encoder
        encoder.start()
        return Capacity(
            num_blocks=0,
            block_size=encoder.engine.block_size,
            max_batch_size=encoder.max_batch_size,
            max_step_tokens=encoder.max_step_tokens,
            session_len=encoder.session_len,
            vocab_size=encoder.config.vocab_size,
            device=encoder.device.type,
            choices=encoder.choices(),
            pooling=encoder.pooling,
        )

    def launch(self, plan: StepPlan) -> Launched:
        """Start a step; what it raises at once, it raises here."""
        return self._encoder.run(plan)

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a method of the encoder; a list of one."""
        return [getattr(self._encoder, name)(*args)]

    def stop(self) -> None:
        """Release the model; safe to call twice."""
        self._encoder.stop()
