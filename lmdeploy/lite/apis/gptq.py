"""auto_gptq(): weights in 2, 3, 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path

from lmdeploy.lite import methods
from lmdeploy.lite.apis.common import options_of, quantise
from lmdeploy.lite.recipe import Effort
from lmdeploy.lite.report import Report


def auto_gptq(model: str, work_dir: str | Path = './work_dir', calib_dataset: str = 'mix', calib_samples: int = 128,
              calib_seqlen: int = 2048, batch_size: int = 1, dtype: str = 'auto', revision: str | None = None,
              w_bits: int = 4, w_group_size: int = 128, *, device: str = 'auto', w_sym: bool = True,
              format: str = 'gptq', effort: Effort = 'normal', all_samples: bool = False,
              eval_tokens: int | None = None) -> Report:  # fmt: skip
    """As ``lmdeploy lite auto_gptq``; arguments and errors as of :func:`lmdeploy.lite.apis.auto_awq.auto_awq`."""
    options = options_of(work_dir, calib_dataset, calib_samples, calib_seqlen, batch_size, dtype, device, all_samples,
                         eval_tokens)  # fmt: skip
    recipe = methods.gptq(w_bits, w_group_size, symmetric=w_sym, form=format, effort=effort)
    return quantise(model, recipe, options, 'auto_gptq', revision)
