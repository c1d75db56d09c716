"""What the functions share."""

from __future__ import annotations

import sys
from pathlib import Path

from lmdeploy.hub.resolve import resolve
from lmdeploy.lite.driver import Watch, nobody
from lmdeploy.lite.job import Job, Options
from lmdeploy.lite.recipe import Recipe
from lmdeploy.lite.report import Report


def quantise(model: str, recipe: Recipe, options: Options, command: str, revision: str | None = None,
             download_dir: str | None = None, watch: Watch = nobody) -> Report:  # fmt: skip
    """Run ``recipe`` on a model, or return the report of an equal run that has ended in the folder."""
    files = resolve(model, revision=revision, download_dir=download_dir)
    job = Job.open(files.path, recipe, options)
    try:
        return job.finished() or job.run(watch, command, model)
    finally:
        job.close()


def options_of(work_dir: str | Path, calib_dataset: str, calib_samples: int, calib_seqlen: int, batch_size: int,
               dtype: str, device: str, exact: bool, eval_tokens: int | None = None) -> Options:  # fmt: skip
    """Options of a run from Python.

    Args:
        exact: all samples that are asked for, on a CPU as well. eval_tokens: of each held-out text on which the result
            is judged; None: as many as the device does quickly, 0: not at all.
    """
    return Options(Path(work_dir).expanduser(), calib_dataset, calib_samples, calib_seqlen,
                   sys.maxsize if exact else None, batch_size, eval_tokens, dtype, device, answers=False)  # fmt: skip
