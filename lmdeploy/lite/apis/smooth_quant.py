"""smooth_quant(): weights and inputs in 8 bits."""

from __future__ import annotations

from pathlib import Path

from lmdeploy.lite import methods
from lmdeploy.lite.apis.common import options_of, quantise
from lmdeploy.lite.recipe import Effort
from lmdeploy.lite.report import Report


def smooth_quant(model: str, work_dir: str | Path = './work_dir', calib_dataset: str = 'mix', calib_samples: int = 128,
                 calib_seqlen: int = 2048, search_scale: bool = False, batch_size: int = 1, dtype: str = 'auto',
                 device: str = 'auto', quant_dtype: str = 'int8', revision: str | None = None,
                 download_dir: str | None = None, *, format: str = 'smooth_quant', effort: Effort = 'normal',
                 all_samples: bool = False, eval_tokens: int | None = None) -> Report:  # fmt: skip
    """As ``lmdeploy lite smooth_quant``; arguments and errors as of :func:`lmdeploy.lite.apis.auto_awq.auto_awq`."""
    options = options_of(work_dir, calib_dataset, calib_samples, calib_seqlen, batch_size, dtype, device, all_samples,
                         eval_tokens)  # fmt: skip
    recipe = methods.smooth_quant(quant_dtype, form=format, search=search_scale, effort=effort)
    return quantise(model, recipe, options, 'smooth_quant', revision, download_dir)
