"""What is measured of each op: calls on tensors of a model's shapes, and the bytes and operations that they need.

``OPS`` has an entry for every op of the table. Products and attention are measured as the model runs them, through the
kernels and the backend that it would choose, and not as ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lmdeploy.attention.backend import AttentionCase, Rotation, choose
from lmdeploy.bench.device import Call
from lmdeploy.config.model import ModelConfig
from lmdeploy.kv.cache import PAGE, KVCache, KVShape
from lmdeploy.kv.format import format_of
from lmdeploy.ops.round_columns import round_columns
from lmdeploy.ops.sample import uniforms
from lmdeploy.ops.table import Op, OpCase, registered
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.runner.tables import DeviceTables

CACHED_GPU, CACHED_CPU = 400 << 20, 64 << 20  # bytes that no cache holds
MOST_COPIES = 64


@dataclass(slots=True)
class Probe:
    """One thing to measure.

    Attributes:
        calls: the same work on copies of the tensors, which take turns.
        bytes: that one call has to read and write. flops: operations of its products, on numbers of 8 bits of the type
            ``inputs`` where it names one.
    """

    name: str
    shape: str
    implementation: str
    calls: list[Call]
    bytes: float
    flops: float = 0.0
    inputs: str = ''


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and for what shapes.

    Attributes:
        rows: tokens of a step. context: cached tokens of each row, where that matters.
        only: tensors are made for what has this in its name, and for nothing else.
    """

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    rows: int
    context: int
    only: str = ''

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def copies(self, nbytes: float) -> int:
        """So many copies of a call's tensors lie outside every cache."""
        enough = CACHED_CPU if self.device.type == 'cpu' else CACHED_GPU
        return max(1, min(MOST_COPIES, int(enough // max(1.0, nbytes)) + 1))

    def calls(self, nbytes: float, make: Callable[[], Call]) -> list[Call]:
        return [make() for _ in range(self.copies(nbytes))]


Work = tuple[str, float, float, Callable[[], Call]]  # shape, bytes, flops, and what makes a call on new tensors


def _norm(bench: Bench, name: str) -> Work:
    op, width = registered(bench.device.type)[name], bench.config.hidden_size
    inputs = 1 if name == 'rms_norm' else 2
    weights = [bench.random(width) for _ in range(2 if name == 'norm_add_rms_norm' else 1)]

    def make() -> Call:
        xs = [bench.random(bench.rows, width) for _ in range(inputs)]
        return lambda: op(*xs, *weights, bench.config.rms_norm_eps)

    return f'[{bench.rows}, {width}]', 2 * inputs * bench.rows * width * bench.dtype.itemsize, 0.0, make


def _activation(bench: Bench, name: str) -> Work:
    op, width = registered(bench.device.type)[name], bench.config.intermediate_size

    def make() -> Call:
        x = bench.random(bench.rows, 2 * width)
        return lambda: op(x)

    return f'[{bench.rows}, 2 x {width}]', 3 * bench.rows * width * bench.dtype.itemsize, 0.0, make


def _hadamard(bench: Bench, name: str) -> Work:
    op, width = registered(bench.device.type)[name], bench.config.intermediate_size
    block = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if width % size == 0)

    def make() -> Call:
        x = bench.random(bench.rows, width)
        return lambda: op(x, block)

    size = bench.rows * width
    return f'[{bench.rows}, {width}] by {block}', 2 * size * bench.dtype.itemsize, 2.0 * size * block, make


def _quantize(bench: Bench, name: str) -> Work:
    """Inputs of a layer, to int8, alone and behind what makes them."""
    op, config, rows = registered(bench.device.type)[name], bench.config, bench.rows
    gated = name == 'gate_mul_quantize'
    width = config.intermediate_size if gated else config.hidden_size
    weight, scale = bench.random(width), torch.ones((), device=bench.device)
    read = 2 if gated or name == 'add_rms_norm_quantize' else 1
    written = bench.dtype.itemsize if name == 'add_rms_norm_quantize' else 0  # the sum

    def make() -> Call:
        x, residual = bench.random(rows, width * (2 if gated else 1)), bench.random(rows, width)
        if name == 'quantize_tokens':
            return lambda: op(x, 'int8', 0)
        if name == 'quantize_static':
            return lambda: op(x, 'int8', scale)
        if gated:
            return lambda: op(x, config.activation, False, 'int8', 0)
        inputs = (x, residual) if name == 'add_rms_norm_quantize' else (x,)
        return lambda: op(*inputs, weight, config.rms_norm_eps, 'int8', 0)

    return f'[{rows}, {width}]', rows * width * (read * bench.dtype.itemsize + written + 1), 0.0, make


def _round_columns(bench: Bench, name: str) -> Work:
    width, block = bench.config.hidden_size, 128

    def make() -> Call:
        targets, mixing, scales = (bench.random(rows, size, dtype=torch.float32) for rows, size in (
            (block, width), (block, block), (block, width)))
        return lambda: round_columns(targets, mixing, scales, None, -8, 7, None)

    return f'[{block}, {width}]', 18 * block * width, 2.0 * block * block * width / 2, make


def _embed(bench: Bench, name: str) -> Work:
    op, config = registered(bench.device.type)[name], bench.config
    table = bench.random(config.vocab_size, config.hidden_size)

    def make() -> Call:
        ids = torch.randint(config.vocab_size, (bench.rows,), device=bench.device, dtype=torch.int32)
        return lambda: op(ids, table, 1.0)

    return f'[{bench.rows}] of {config.vocab_size}', 2 * bench.rows * config.hidden_size * bench.dtype.itemsize, 0, make


def _rope_tables(bench: Bench, name: str) -> Work:
    op, dim = registered(bench.device.type)[name], bench.config.head_dim

    def make() -> Call:
        positions = torch.arange(bench.rows, device=bench.device, dtype=torch.int32)
        frequencies = torch.rand(dim // 2, device=bench.device)
        return lambda: op(positions, frequencies, 1.0)

    return f'[{bench.rows}, {dim}]', 8 * bench.rows * dim, 0.0, make


def _rotation(bench: Bench, rows: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, 1, bench.config.head_dim, device=bench.device)
    return angles.cos(), angles.sin()


def _rope(bench: Bench, name: str) -> Work:
    op, config = registered(bench.device.type)[name], bench.config
    shape = (bench.rows, config.num_heads + config.num_kv_heads, config.head_dim)
    size = shape[0] * shape[1] * shape[2]
    cos, sin = _rotation(bench, bench.rows)

    def make() -> Call:
        x = bench.random(*shape)
        return lambda: op(x, cos, sin)

    return str(list(shape)), size * (bench.dtype.itemsize + 4), 0.0, make


def _pages(bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value pages of one layer for the rows, and where each row writes."""
    blocks = -(-bench.rows // PAGE) + 1
    shape = (blocks, bench.config.num_kv_heads, PAGE, bench.config.head_dim)
    slots = torch.arange(PAGE, PAGE + bench.rows, device=bench.device)
    k, v = (torch.zeros(shape, dtype=bench.dtype, device=bench.device) for _ in range(2))
    return k, v, slots


def _write_kv(bench: Bench, name: str) -> Work:
    op, config = registered(bench.device.type)[name], bench.config
    shape = (bench.rows, config.num_kv_heads, config.head_dim)

    def make() -> Call:
        k, v, (k_pages, v_pages, slots) = bench.random(*shape), bench.random(*shape), _pages(bench)
        return lambda: op(k, v, k_pages, v_pages, slots)

    return f'2 x {list(shape)}', 4 * shape[0] * shape[1] * shape[2] * bench.dtype.itemsize, 0.0, make


def _rope_write_kv(bench: Bench, name: str) -> Work:
    op, config = registered(bench.device.type)[name], bench.config
    shape = (bench.rows, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
    cos, sin = _rotation(bench, bench.rows)

    def make() -> Call:
        qkv, (k_pages, v_pages, slots) = bench.random(*shape), _pages(bench)
        return lambda: op(qkv, cos, sin, None, None, config.rms_norm_eps, k_pages, v_pages, slots)

    return str(list(shape)), 2 * shape[0] * shape[1] * shape[2] * bench.dtype.itemsize, 0.0, make


def _rope_write_codes(bench: Bench, name: str) -> Work:
    """Codes of 4 bits, with their transform."""
    op, config = registered(bench.device.type)[name], bench.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    cos, sin = _rotation(bench, bench.rows)

    def make() -> Call:
        qkv, slots = bench.random(bench.rows, heads + 2 * kv_heads, dim), _pages(bench)[2]
        kv = KVCache(KVShape(1, kv_heads, dim, 4), -(-bench.rows // PAGE), PAGE, bench.dtype, bench.device)
        return lambda: op(qkv, cos, sin, None, None, config.rms_norm_eps, None, None, kv.layer(0), slots)

    moved = (2 * heads + 2 * kv_heads) * dim * bench.dtype.itemsize + kv_heads * (dim + 8)
    return str([bench.rows, heads + 2 * kv_heads, dim]), bench.rows * moved, 0.0, make


def _logits(bench: Bench, name: str) -> Work:
    """Ops that take logits and perhaps something more."""
    op, shape = registered(bench.device.type)[name], (bench.rows, bench.config.vocab_size)
    rows = bench.rows

    def make() -> Call:
        logits = bench.random(*shape, dtype=torch.float32)
        if name == 'ranked':
            return lambda: op(logits, 20)
        if name == 'draw':
            return _draw(op, logits)
        if name == 'sample_slots':
            tables = DeviceTables(rows, PAGE, PAGE, 0, bench.device).sampling
            at = torch.arange(rows, device=bench.device, dtype=torch.int32)
            return lambda: op(logits, at, at, tables, True)
        return lambda: op(logits)

    return str(list(shape)), 4 * shape[0] * shape[1], 0.0, make


def _draw(op: Op, logits: Tensor) -> Call:
    """Draws with every common cut, from numbers that differ by row."""
    rows, device = len(logits), logits.device
    heat, share = (torch.full((rows,), value, device=device) for value in (0.8, 0.0))
    top_k = torch.full((rows,), 40, dtype=torch.int64, device=device)
    top_p = torch.full((rows,), 0.9, dtype=torch.float64, device=device)
    each = np.arange(rows, dtype=np.uint64)
    chance = torch.from_numpy(uniforms(each, np.zeros_like(each))).to(device)
    return lambda: op(logits, heat, top_k, top_p, share, chance)


def _decode_inputs(bench: Bench, name: str) -> Work:
    op, rows = registered(bench.device.type)[name], bench.rows

    def make() -> Call:
        packed = torch.zeros(4, rows, dtype=torch.int32, device=bench.device)
        packed[0] = torch.arange(rows)
        blocks = torch.zeros(rows + 1, -(-bench.context // PAGE), dtype=torch.int32, device=bench.device)
        last = torch.zeros(rows + 1, dtype=torch.int32, device=bench.device)
        return lambda: op(packed, blocks, last, PAGE)

    return f'[4, {rows}]', 44 * rows, 0.0, make


def _chunk_inputs(bench: Bench, name: str) -> Work:
    op, rows = registered(bench.device.type)[name], bench.rows

    def make() -> Call:
        by_token, by_row = (torch.zeros(fields, rows, dtype=torch.int32, device=bench.device) for fields in (3, 5))
        starts = torch.arange(rows + 1, dtype=torch.int32, device=bench.device)
        blocks = torch.zeros(rows + 1, -(-bench.context // PAGE), dtype=torch.int32, device=bench.device)
        last = torch.zeros(rows + 1, dtype=torch.int32, device=bench.device)
        return lambda: op(by_token, by_row, starts, blocks, last, PAGE)

    return f'[3, {rows}]', 84 * rows, 0.0, make


def _keep_results(bench: Bench, name: str) -> Work:
    op, rows = registered(bench.device.type)[name], bench.rows

    def make() -> Call:
        results = torch.zeros(4, 2 * rows, dtype=torch.int32, device=bench.device)
        turn = torch.ones(1, dtype=torch.int32, device=bench.device)
        tokens = torch.zeros(rows, dtype=torch.int32, device=bench.device)
        status = torch.zeros(rows, dtype=torch.uint8, device=bench.device)
        return lambda: op(results, turn, tokens, status)

    return f'[{rows}]', 13 * rows, 0.0, make


OPS: dict[str, Callable[[Bench, str], Work]] = {
    'rms_norm': _norm, 'add_rms_norm': _norm, 'norm_add_rms_norm': _norm, 'silu_mul': _activation,
    'gelu_tanh_mul': _activation, 'embed': _embed, 'rope_tables': _rope_tables, 'rope': _rope, 'write_kv': _write_kv,
    'rope_write_kv': _rope_write_kv, 'rope_write_codes': _rope_write_codes,
    'contain_non_finite': _logits, 'greedy': _logits, 'ranked': _logits,
    'log_normaliser': _logits, 'draw': _logits, 'sample_slots': _logits, 'decode_inputs': _decode_inputs,
    'chunk_inputs': _chunk_inputs, 'keep_results': _keep_results, 'hadamard': _hadamard,
    'round_columns': _round_columns,
    'quantize_tokens': _quantize, 'quantize_static': _quantize, 'rms_norm_quantize': _quantize,
    'add_rms_norm_quantize': _quantize, 'gate_mul_quantize': _quantize,
}
AS_THE_MODEL_DOES = {  # see products() and attention()
    'linear', 'linear_float', 'gated_linear', 'packed_linear', 'packed_codes_linear', 'scaled_linear',
    'paged_attention'}


def ops(bench: Bench) -> Iterator[Probe]:
    """Every op that has an implementation for the device."""
    for name, op in sorted(registered(bench.device.type).items()):
        here = any(candidate.device == bench.device.type for candidate in op.candidates)
        if name not in OPS or bench.only not in name or not here:
            continue
        shape, nbytes, flops, make = OPS[name](bench, name)
        chosen = op.chosen(OpCase(bench.device.type, bench.dtype)).removeprefix('lmdeploy.ops.')
        yield Probe(name, shape, chosen, bench.calls(nbytes, make), nbytes, flops)


def attention(bench: Bench) -> Iterator[Probe]:
    """The backend that the model would choose, rotation and cache write included: a decode step, and one prompt; over a
    cache of numbers, and of codes of 8 and 4 bits."""
    for bits in (0, 8, 4):
        for name, queries in (('attention decode', [1] * bench.rows), ('attention prompt', [bench.context])):
            name += f' int{bits}' if bits else ''
            if bench.only in name:
                yield _attention(bench, name, queries, bits)


def _attention(bench: Bench, name: str, queries: list[int], bits: int) -> Probe:
    config, context = bench.config, bench.context
    case = AttentionCase(config.num_heads, config.num_kv_heads, config.head_dim, bits=bits)
    backend = choose(bench.device, bench.dtype, case)
    per_row, rows, tokens = -(-context // PAGE), len(queries), sum(queries)
    one = KVShape(1, config.num_kv_heads, config.head_dim, bits)
    cached = rows * context * one.bytes_per_block(PAGE, format_of(bits, bench.dtype)) // PAGE
    layers = bench.copies(cached)
    kv = KVCache(replace(one, num_layers=layers), rows * per_row, PAGE, bench.dtype, bench.device)
    for layer in map(kv.layer, range(layers)):  # zeros are multiplied faster
        for pages in (layer.k, layer.v):
            pages.random_(-128, 128) if bits else pages.normal_()
        for scales in layer.scales if bits else ():
            scales.uniform_(0.01, 0.02)
    batch = _batch(bench, queries, per_row)
    batch.plan = backend.prepare(case, batch, kv)
    cos, sin = _rotation(bench, tokens)
    width = config.num_heads + 2 * config.num_kv_heads
    qkv = bench.random(tokens, width, config.head_dim)
    scale = config.attention_scalar**-0.5

    def call_of(layer: int) -> Call:
        pages, rotation = kv.layer(layer), Rotation(cos, sin)
        return lambda: backend.run(qkv, rotation, pages, batch, scale, 0)

    pairs = sum(context * n - n * (n - 1) / 2 for n in queries)  # of a query and a key that it sees
    moved = cached + tokens * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * bench.dtype.itemsize
    return Probe(name, f'{rows} x {queries[0]} over {context}', backend.name, [call_of(i) for i in range(layers)],
                 moved, 4 * pairs * config.num_heads * config.head_dim)


def _batch(bench: Bench, queries: list[int], per_row: int) -> ForwardBatch:
    """Every row's queries are the last tokens of its context."""
    device, rows, context = bench.device, len(queries), bench.context
    table = torch.arange(1, rows * per_row + 1, dtype=torch.int32).view(rows, per_row)
    positions = [p for n in queries for p in range(context - n, context)]
    row_of = [row for row, n in enumerate(queries) for _ in range(n)]
    slots = [int(table[row, p // PAGE]) * PAGE + p % PAGE for row, p in zip(row_of, positions)]
    start = [0]
    for n in queries:
        start.append(start[-1] + n)

    def index(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return ForwardBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int32, device=device), positions=index(positions),
        kv_slots=index(slots, torch.int64), query_start=index(start), kv_lens=index([context] * rows),
        block_table=table.to(device), output_rows=index(start[1:], torch.int64) - 1, max_query=max(queries),
        max_kv=context, host_query_start=start, host_kv_lens=[context] * rows,
        num_decode=rows if max(queries) == 1 else 0)
