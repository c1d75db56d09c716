"""A loop that runs a model without an engine: rows with chosen block tables, fed in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmdeploy.config.model import ModelConfig
from lmdeploy.kv.cache import KVCache
from lmdeploy.models.registry import CausalLM, build_model
from lmdeploy.nn.build import Build
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.weights.checkpoint import open_checkpoint


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = 'cpu', **options: Any) -> CausalLM:
    """Our model of ``folder``; every tensor of the checkpoint must be used."""
    with open_checkpoint(folder) as checkpoint:
        model = build_model(ModelConfig.from_dict(checkpoint.config, **options), Build(dtype, torch.device(device)))
        model.load(checkpoint.prefix())
        checkpoint.finish(model.ignore)
    return model


@dataclass
class Row:
    """One sequence: its blocks, and how many of its tokens are in the cache."""

    blocks: list[int]
    done: int = 0


@dataclass
class Driver:
    """Runs steps of several rows over one cache; block ids come from ``free``."""

    model: CausalLM
    num_blocks: int = 64
    block_size: int = 64
    dtype: torch.dtype = torch.float32
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.model.build.device
        self.kv = KVCache(self.model.kv_shape, self.num_blocks, self.block_size, self.dtype, self.device)
        self.free = self.free or list(range(1, self.num_blocks + 1))

    def row(self) -> Row:
        return Row([])

    def batch(self, work: Sequence[tuple[Row, Sequence[int]]], padding: int = 0) -> ForwardBatch:
        """A batch that feeds each row its next tokens; all positions give logits."""
        tokens, positions, slots, start, lens = [], [], [], [0], []
        for row, ids in work:
            while len(row.blocks) * self.block_size < row.done + len(ids):
                row.blocks.append(self.free.pop(0))
            for i, token in enumerate(ids, row.done):
                tokens.append(token)
                positions.append(i)
                slots.append(row.blocks[i // self.block_size] * self.block_size + i % self.block_size)
            row.done += len(ids)
            start.append(start[-1] + len(ids))
            lens.append(row.done)
        width = max(len(row.blocks) for row, _ in work)
        table = [row.blocks + [0] * (width - len(row.blocks)) for row, _ in work]
        pad = [0] * padding

        def put(values: list, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return ForwardBatch(
            put(tokens + pad), put(positions + pad), put(slots + pad, torch.int64), put(start), put(lens), put(table),
            put(list(range(len(tokens))), torch.int64), max(len(ids) for _, ids in work), max(lens), start, lens,
            num_decode=len(list(takewhile(lambda one: len(one[1]) == 1, work))),
        )  # fmt: skip

    def step(self, work: Sequence[tuple[Row, Sequence[int]]], padding: int = 0) -> list[Tensor]:
        """Run one step; ``[n, vocab]`` logits of every row's tokens."""
        batch = self.batch(work, padding)
        logits = self.model.logits(self.model(batch, self.kv))
        return list(logits.split([len(ids) for _, ids in work]))

    def sequence(self, ids: Sequence[int], chunk: int = 0) -> Tensor:
        """Logits of a whole sequence alone, fed ``chunk`` tokens at a time (0: at once)."""
        row, chunk = self.row(), chunk or len(ids)
        parts = [self.step([(row, ids[i : i + chunk])])[0] for i in range(0, len(ids), chunk)]
        self.free.extend(row.blocks)
        return torch.cat(parts)
