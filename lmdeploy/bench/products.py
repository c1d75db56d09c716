"""The products of a model's layers and of its head, dense and quantised, by the kernels that it would choose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmdeploy.bench.device import Call
from lmdeploy.bench.probes import Bench, Probe
from lmdeploy.bench.shapes import QUANTISED
from lmdeploy.config.quantization import read_quantization
from lmdeploy.ops.quantize import TYPES
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import scheme_of
from lmdeploy.quant.kernels import KernelCase, choose_gated, choose_kernel
from lmdeploy.quant.scheme import FLOAT8, QuantScheme, dense_scheme


def products(bench: Bench, quant: str = '') -> Iterator[Probe]:
    """The products of a layer and of the output head, of dense weights or of those that ``quant``, a key of QUANTISED,
    names; a head whose inputs are quantised, or of few bits, is nothing that a model has."""
    config, scheme = bench.config, scheme_named(quant, bench.dtype)
    hidden, query = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    shapes = [('qkv', query + 2 * kv, hidden), ('o', hidden, query), ('down', hidden, config.intermediate_size)]
    if scheme.bits >= 8 and not scheme.activation:
        shapes.append(('head', config.vocab_size, hidden))
    for name, out, inner in shapes:
        if bench.only in f'linear {name} {quant}'.rstrip():
            yield _linear(bench, scheme, name, quant, out, inner)
    if bench.only in f'linear gate_up {quant}'.rstrip():
        yield _gated(bench, scheme, quant, hidden, config.intermediate_size)


def scheme_named(quant: str, dtype: torch.dtype) -> QuantScheme:
    """The scheme of a key of QUANTISED; of dense weights for ``''``."""
    quantization = read_quantization({'quantization_config': QUANTISED[quant]}) if quant else None
    storage = None if quantization is None else quantization.storage('layers.0.mlp.down_proj')
    return dense_scheme(8 * dtype.itemsize) if storage is None else scheme_of(storage)


def _bundle(bench: Bench, scheme: QuantScheme, out: int, inner: int) -> LinearBundle:
    if scheme.dense:
        return LinearBundle(scheme, out, inner, weight=bench.random(out, inner) * inner**-0.5)
    device, groups = bench.device, -(-inner // scheme.group) if scheme.group else 1
    middle, zeros = 1 << scheme.bits - 1, None
    codes: Tensor
    if scheme.name in FLOAT8:
        codes = bench.random(out, inner, dtype=TYPES[scheme.name]).t()
    else:
        low, kind = (-middle, torch.int8) if scheme.symmetric else (0, torch.uint8)
        codes = torch.randint(low, low + 2 * middle, (out, inner), device=device, dtype=kind).t()
        zeros = None if scheme.symmetric else torch.full((groups, out), middle, device=device, dtype=torch.int16)
    scales = torch.full((groups, out), inner**-0.5 / middle, device=device, dtype=torch.float16)
    return LinearBundle(scheme, out, inner, codes=codes, scales=scales, zeros=zeros)


def _cost(bench: Bench, scheme: QuantScheme, out: int, inner: int) -> tuple[float, float]:
    """Bytes and operations of ``[rows, inner] @ [inner, out]``."""
    nbytes = out * inner * scheme.weight_bits / 8 + bench.rows * (inner + out) * bench.dtype.itemsize
    return nbytes, 2.0 * bench.rows * out * inner


def _linear(bench: Bench, scheme: QuantScheme, name: str, quant: str, out: int, inner: int) -> Probe:
    case = KernelCase(scheme, bench.dtype, bench.device, out, inner)
    kernel = choose_kernel(case)
    nbytes, flops = _cost(bench, scheme, out, inner)

    def make() -> Call:
        packed, x = kernel.pack(_bundle(bench, scheme, out, inner), case), bench.random(bench.rows, inner)
        return (lambda: kernel.apply_float(x, packed)) if name == 'head' else (lambda: kernel.apply(x, packed))

    return Probe(f'linear {name} {quant}'.rstrip(), f'[{bench.rows}, {inner}] x [{inner}, {out}]', kernel.name,
                 bench.calls(nbytes, make), nbytes, flops, scheme.activation)


def _gated(bench: Bench, scheme: QuantScheme, quant: str, hidden: int, inner: int) -> Probe:
    case = KernelCase(scheme, bench.dtype, bench.device, inner, hidden)
    kernel = choose_gated(case)
    nbytes, flops = _cost(bench, scheme, 2 * inner, hidden)
    nbytes -= bench.rows * inner * bench.dtype.itemsize  # what comes out is half as wide

    def make() -> Call:
        packed = kernel.pack(_bundle(bench, scheme, inner, hidden), _bundle(bench, scheme, inner, hidden), case)
        x = bench.random(bench.rows, hidden)
        return lambda: kernel.apply(x, packed, bench.config.activation)

    return Probe(f'linear gate_up {quant}'.rstrip(), f'[{bench.rows}, {hidden}] x [{hidden}, 2 x {inner}]', kernel.name,
                 bench.calls(nbytes, make), nbytes, flops, scheme.activation)
