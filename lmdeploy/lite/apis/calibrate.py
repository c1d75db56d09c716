"""calibrate(): statistics of all inputs of linear layers."""

from __future__ import annotations

from pathlib import Path

from lmdeploy.hub.resolve import resolve
from lmdeploy.lite.apis.common import options_of
from lmdeploy.lite.job import open_calibration
from lmdeploy.lite.observe import observe


def calibrate(model: str, calib_dataset: str = 'mix', calib_samples: int = 128, calib_seqlen: int = 2048,
              work_dir: str | Path = './work_dir', device: str = 'auto', batch_size: int = 1, dtype: str = 'auto',
              *, all_samples: bool = False) -> Path:  # fmt: skip
    """As ``lmdeploy lite calibrate``; returns the file of statistics.

    Raises:
        SourceError, ConfigError, LoadError: what is wrong with the model or an option.
    """
    options = options_of(work_dir, calib_dataset, calib_samples, calib_seqlen, batch_size, dtype, device, all_samples)
    source, calibration, _, place = open_calibration(resolve(model).path, options)
    with source.checkpoint:
        return observe(source, calibration, options.work_dir, place, batch_size)
