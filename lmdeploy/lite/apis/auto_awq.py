"""auto_awq(): weights in 4 bits."""

from __future__ import annotations

from pathlib import Path

from lmdeploy.lite import methods
from lmdeploy.lite.apis.common import options_of, quantise
from lmdeploy.lite.recipe import Effort
from lmdeploy.lite.report import Report


def auto_awq(model: str, work_dir: str | Path = './work_dir', calib_dataset: str = 'mix', calib_samples: int = 128,
             batch_size: int = 1, calib_seqlen: int = 2048, w_bits: int = 4, w_sym: bool = False,
             w_group_size: int = 128, search_scale: bool = True, device: str = 'auto', revision: str | None = None,
             dtype: str = 'auto', download_dir: str | None = None, *, effort: Effort = 'normal',
             all_samples: bool = False, eval_tokens: int | None = None) -> Report:  # fmt: skip
    """As ``lmdeploy lite auto_awq``.

    Args:
        search_scale: AWQ's search; False: one fixed smoothing.
        all_samples: take all samples on a CPU, too, instead of as many as take minutes.
        eval_tokens: of each held-out text on which the result is judged; 0: not at all.

    Raises:
        SourceError, ConfigError, LoadError: what is wrong with the model or an option, before any work.
    """
    options = options_of(work_dir, calib_dataset, calib_samples, calib_seqlen, batch_size, dtype, device, all_samples,
                         eval_tokens)  # fmt: skip
    recipe = methods.awq(w_bits, w_group_size, symmetric=w_sym, search=search_scale, effort=effort)
    return quantise(model, recipe, options, 'auto_awq', revision, download_dir)
