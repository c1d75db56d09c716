"""Triton kernels for GPUs; importing this package registers them in the op table."""

from lmdeploy.ops.triton import (
    activation,
    embedding,
    gemm,
    hadamard,
    kv_codes,
    layer_norm,
    logits,
    norm,
    quant_packed,
    quant_packed_codes,
    quant_scaled,
    quantize,
    rope,
    round_columns,
    sample,
    step,
)

__all__ = ['activation', 'embedding', 'gemm', 'hadamard', 'kv_codes', 'layer_norm', 'logits', 'norm', 'quant_packed',
           'quant_packed_codes', 'quant_scaled', 'quantize', 'rope', 'round_columns', 'sample', 'step']  # fmt: skip
