"""TextEncoder: one rank's device side of an encoder, from a plan of whole texts to their vectors.

Life as of :class:`lmdeploy.runner.model_runner.ModelRunner`, without slots, cache and sampler.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lmdeploy.config.encoder import EncoderConfig, Pooling
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.plan import StepPlan
from lmdeploy.errors import ConfigError
from lmdeploy.models.bert import IGNORE, Bert, Texts, pool
from lmdeploy.nn.build import Build
from lmdeploy.runner.handle import Launched
from lmdeploy.runner.host import limit_threads, return_freed_memory
from lmdeploy.runner.memory import gib, measure, name_of
from lmdeploy.runner.model_runner import choose_device, choose_dtype
from lmdeploy.weights.checkpoint import open_checkpoint
from lmdeploy.weights.pooling import read_pooling

CPU_BATCH, GPU_BATCH = 16, 256
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 2048, 32768
LEAST_ROOM = 64 << 20  # bytes beside the weights: activations of a step


class TextEncoder:
    """Holds an encoder on one device.

    Args:
        engine: what the user asked for.
        path: model folder.

    Attributes:
        config, pooling, dtype, device, session_len, max_batch_size, max_step_tokens: known after :meth:`start`.
    """

    def __init__(self, engine: EngineConfig, path: Path) -> None:
        self.engine, self.path = engine, path
        self.config: EncoderConfig
        self.pooling: Pooling
        self.dtype: torch.dtype
        self.device: torch.device
        self.model: Bert | None = None
        self.session_len = self.max_batch_size = self.max_step_tokens = self.threads = 0

    @torch.no_grad()
    def start(self) -> None:
        """Load the model; what cannot work is refused before a weight is read.

        Raises:
            ConfigError, LoadError: what is wrong with the options, the model, or the memory.
        """
        with open_checkpoint(self.path) as checkpoint:
            self.config = EncoderConfig.from_dict(checkpoint.config)
            self.pooling = read_pooling(self.path)
            self._choose()
            model = Bert(self.config, Build(dtype=self.dtype, device=self.device))
            model.load(checkpoint.prefix())
            checkpoint.finish(IGNORE)
        self.model = model
        return_freed_memory()

    def stop(self) -> None:
        """Let go of the model; safe to call twice."""
        self.model = None
        return_freed_memory()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Launched:
        """Launch a step: each row is a whole text, and gives one row of ``hidden``."""
        launched = Launched(plan.step, plan.rows)
        if not plan.rows:
            return launched
        assert self.model is not None
        try:
            texts = Texts.of(np.diff(plan.query_start).tolist(), self.device)
            token_ids = torch.from_numpy(plan.tokens.astype(np.int64)).to(self.device)
            vectors = pool(self.model(token_ids, texts), texts, self.pooling)
        except (MemoryError, torch.OutOfMemoryError) as error:
            launched.failure = f'{plan.num_tokens} tokens: {str(error).splitlines()[0][:200]}'
            return launched.send(self.device)
        launched.hidden = {row: vectors[row:row + 1] for row in range(plan.rows)}
        return launched.send(self.device)

    def choices(self) -> dict[str, str]:
        """What really runs, for the start line."""
        return {'runner': 'encoder', 'dtype': name_of(self.dtype), 'pooling': self.pooling.mode,
                'threads': str(self.threads)}

    def _choose(self) -> None:
        """Device, type, lengths.

        Raises:
            ConfigError: LMD-202, LMD-205, LMD-206, LMD-209.
        """
        engine, config = self.engine, self.config
        most = config.context_len
        if engine.session_len is not None and engine.session_len > most:
            raise ConfigError('LMD-209', session_len=engine.session_len, most=most)
        self.session_len = engine.session_len or min(self.pooling.max_tokens or most, most)
        self.device = choose_device(engine.device)
        # vectors are compared by small differences, and an encoder is small: 16 bits only where it was stored in them
        name = engine.dtype
        if name == 'auto' and (self.device.type == 'cpu' or config.dtype_name not in ('bfloat16', 'float16')):
            name = 'float32'
        self.dtype = choose_dtype(name, self.device, config.dtype_name)
        self.threads = limit_threads()
        on_cpu = self.device.type == 'cpu'
        self.max_batch_size = engine.max_batch_size or (CPU_BATCH if on_cpu else GPU_BATCH)
        usual = CPU_STEP_TOKENS if on_cpu else GPU_STEP_TOKENS
        self.max_step_tokens = max(engine.max_step_tokens or usual, self.session_len)
        needed, free = self._weight_bytes() + LEAST_ROOM, measure(self.device).free
        if needed > free:
            raise ConfigError('LMD-202', needed=gib(needed), free=gib(free), weights=gib(needed - LEAST_ROOM),
                              workspace=gib(LEAST_ROOM), dtype=name_of(self.dtype))

    def _weight_bytes(self) -> int:
        config = self.config
        tables = (config.vocab_size + config.positions + config.token_types) * config.hidden_size
        layer = 4 * config.hidden_size ** 2 + 2 * config.hidden_size * config.intermediate_size
        return (tables + config.num_layers * layer) * self.dtype.itemsize
