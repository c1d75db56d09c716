"""The ``fp8`` method: float8_e4m3fn weights with scales of blocks, of the tensor, or of output channels.

``weight [out, in]``, and in blocks of [rows, columns] ``weight_scale_inv [ceil(out / rows), ceil(in / columns)]``,
which multiplies in spite of its name; else ``weight_scale``, a number or ``[out, 1]``. Inputs are quantised to the same
type: with blocks in groups of as many channels, else token by token, or by the stored ``input_scale``.
"""

from __future__ import annotations

from lmdeploy.config.quantization import Storage
from lmdeploy.quant.formats.scaled import ScaledFormat


def fp8_format(storage: Storage) -> ScaledFormat:
    names = ('weight_scale_inv', 'weight_scale')
    return ScaledFormat(storage, names if storage.rows > 1 else names[::-1])
