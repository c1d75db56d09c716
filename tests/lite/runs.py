"""Short runs of every recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmdeploy.config.quantization import AWQ, FLOAT, GPTQ, INT, PACK, SMOOTH, Storage
from lmdeploy.lite import awq, rotated, smooth
from lmdeploy.lite.driver import Watch, nobody
from lmdeploy.lite.job import Job, Options
from lmdeploy.lite.recipe import Recipe
from lmdeploy.lite.report import Report

W4 = Storage(AWQ, bits=4, group=32, symmetric=False)
RECIPES: dict[str, Callable[[], Recipe]] = {
    'awq': lambda: awq.AWQ(W4),
    'awq high': lambda: awq.AWQ(W4, 'high'),
    'awq symmetric': lambda: awq.AWQ(Storage(AWQ, bits=4, group=32), 'fast'),
    'awq smoothing': lambda: awq.AWQ(W4, search=False),
    'rounding': lambda: awq.AWQ(W4, smooth=False),
    'gptq': lambda: rotated.GPTQ(Storage(GPTQ, bits=4, group=32, zero_shift=1)),
    'gptq 8': lambda: rotated.GPTQ(Storage(GPTQ, bits=8, group=32, zero_shift=1)),
    'gptq awq': lambda: rotated.GPTQ(W4),
    'portable': lambda: rotated.GPTQ(Storage(GPTQ, bits=4, group=32, zero_shift=1), 'portable'),
    'int8': lambda: smooth.SmoothQuant(Storage(SMOOTH, activation='int8')),
    'fp8': lambda: smooth.SmoothQuant(Storage(SMOOTH, 'float8_e4m3fn', activation='float8_e4m3fn'), search=False),
    'e5m2': lambda: smooth.SmoothQuant(Storage(SMOOTH, 'float8_e5m2', activation='float8_e5m2'), 'fast'),
    'compressed int8': lambda: smooth.SmoothQuant(Storage(INT, activation='int8'), 'fast'),
    'compressed fp8': lambda: smooth.SmoothQuant(Storage(FLOAT, 'float8_e4m3fn', activation='float8_e4m3fn'), 'fast'),
    'w4a8': lambda: rotated.GPTQ(Storage(PACK, bits=4, group=32, activation='int8'), 'native'),
    'w3': lambda: rotated.GPTQ(Storage(PACK, bits=3, group=32, symmetric=False), 'native'),
    'w2': lambda: rotated.GPTQ(Storage(PACK, bits=2, group=32, symmetric=False), 'native'),
}


def options(folder: Path, text: Path, **changes: Any) -> Options:
    given: dict[str, Any] = {'work_dir': folder, 'calib_dataset': str(text), 'calib_samples': 6, 'calib_seqlen': 40,
                             'batch_size': 2, 'eval_tokens': 0, 'device': 'cpu', 'answers': False}  # fmt: skip
    return Options(**(given | changes))


def run(model: Path, recipe: Recipe, given: Options, watch: Watch = nobody) -> Report:
    job = Job.open(model, recipe, given)
    try:
        return job.run(watch)
    finally:
        job.close()


def digests(folder: Path) -> dict[str, str]:
    """sha256 of all files but the reports, which tell how long it took."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())
            if path.is_file() and not path.name.startswith('quant_report')}  # fmt: skip


def ids(count: int, seed: int, size: int = 280) -> torch.Tensor:
    return torch.randint(size, (count,), generator=torch.Generator().manual_seed(seed))
