"""LMDeploy's ``smooth_quant``: ``weight [out, in]`` in int8 or float8, ``scale [out, 1]``, inputs quantised by token.

The smoothing itself needs nothing here: it is folded into norms and weights.
"""

from __future__ import annotations

from lmdeploy.config.quantization import Storage
from lmdeploy.quant.formats.scaled import ScaledFormat


def smooth_format(storage: Storage) -> ScaledFormat:
    return ScaledFormat(storage, ('scale',))
