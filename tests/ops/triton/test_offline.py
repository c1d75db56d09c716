"""Attention and quantised products, compiled for an H100 or H200 without one: what assembler and registers say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip('triton', reason='triton is made for Linux on x86-64')

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmdeploy.ops.triton import paged_attention_decode as decode
from lmdeploy.ops.triton import paged_attention_prefill as prefill
from lmdeploy.ops.triton import quant_packed as packed
from lmdeploy.ops.triton import quant_packed_codes as packed_codes

PTXAS = Path(nvidia.__file__).parent / 'bin' / 'ptxas'
REGISTERS, SHARED = 65536, 228 * 1024  # of a multiprocessor; the system takes 1 KiB of each program's shared memory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, 'dir', str(tmp_path / 'cache'))


def compiled(kernel, types: dict[str, str], constants: dict[str, object], **options):
    """``kernel`` with arguments of ``types``, all pointers aligned, and the rest ``constants``."""
    names = kernel.arg_names
    source = ASTSource(
        kernel, {name: types.get(name, 'constexpr') for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names) if types.get(name, '').startswith('*')})
    return triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)


def fits(binary, programs: int, path: Path) -> bool:
    """Whether a multiprocessor holds ``programs`` of them at once, and none spills registers."""
    path.write_text(binary.asm['ptx'])
    said = subprocess.run([PTXAS, '-v', '-arch=sm_90a', path, '-o', '/dev/null'], capture_output=True, text=True,
                          check=True).stderr  # fmt: skip
    used, spilled = (re.search(pattern, said) for pattern in (r'Used (\d+) registers', r'(\d+) bytes spill stores'))
    assert used and spilled, said
    threads = 32 * binary.metadata.num_warps
    return (int(spilled[1]) == 0 and programs * threads * int(used[1]) <= REGISTERS
            and programs * (binary.metadata.shared + 1024) <= SHARED)  # fmt: skip


def plane(tma: bool, dim: int) -> str:
    return f'tensordesc<bf16[64, {dim}]>' if tma else '*bf16'


INDEX = dict.fromkeys(('block_table', 'table_rows', 'query_start', 'kv_lens'), '*i32')
NUMBERS = dict.fromkeys(('q_plain', 'k_scales', 'v_scales', 'within', 'back')) | dict(
    BITS=0, ASM=True, WORDS_P=16)
VALUES = {'q': '*bf16', 'out': '*bf16', 'table_stride': 'i32', 'q_stride': 'i32', 'scale': 'fp32'}


@pytest.mark.parametrize(('dim', 'pairs'), [(128, 8), (128, 128), (64, 1024)])
def test_decode(dim, pairs, tmp_path):
    config = decode.config_of(dim, 2, pairs)
    binary = compiled(
        decode._decode_kernel,
        INDEX | VALUES | dict.fromkeys(('stretches', 'shares', 'counts'), '*i32')
        | dict.fromkeys(('sums', 'stats'), '*fp32') | dict.fromkeys(('k_pages', 'v_pages'), plane(config.tma, dim)),
        NUMBERS | dict(HEADS=8, GROUP=4, M=16, D=dim, D_P=dim, R=0, BLOCK=64, TILE=64, WINDOW=0,
                       STAGES=config.num_stages, TMA=config.tma, FUSED=config.fused, PRECISION='tf32', WIDTH=4 * dim,
                       CHUNK=4, PDL=True),
        num_warps=4)  # fmt: skip
    assert fits(binary, config.per_sm, tmp_path / 'decode.ptx')
    assert 'mma.sync' in binary.asm['ptx'] and ('cp.async.bulk.tensor' in binary.asm['ptx']) is config.tma


@pytest.mark.parametrize('bits', [8, 4])
def test_decode_of_codes(bits, tmp_path):
    """Codes become operands in registers: nothing is read byte by byte, nothing goes back to shared memory first."""
    config, width = decode.config_of(128, 1, 1024, bits), 128 * bits // 16
    pages = f'tensordesc<i16[64, {width}]>' if config.tma else '*i16'
    binary = compiled(
        decode._decode_kernel,
        INDEX | VALUES | dict.fromkeys(('stretches', 'shares', 'counts', 'k_scales', 'v_scales'), '*i32')
        | dict.fromkeys(('sums', 'stats'), '*fp32') | dict.fromkeys(('k_pages', 'v_pages'), pages),
        dict.fromkeys(('q_plain', 'within', 'back'))
        | dict(HEADS=8, GROUP=4, M=16, D=128, D_P=128, WORDS_P=width, R=0, BLOCK=64, TILE=64, WINDOW=0, BITS=bits,
               ASM=True, STAGES=config.num_stages, TMA=config.tma, FUSED=config.fused, PRECISION='tf32', WIDTH=512,
               CHUNK=4, PDL=True),
        num_warps=4, maxnreg=config.registers)  # fmt: skip
    assert fits(binary, config.per_sm, tmp_path / 'decode.ptx')
    ptx = binary.asm['ptx']
    assert 'ld.shared.b8' not in ptx and 'ld.shared.b16' not in ptx
    assert 'ldmatrix.sync.aligned.m8n8.x4.trans' in ptx and ('cp.async.bulk.tensor' in ptx) is config.tma


def test_prefill(tmp_path):
    """Two programs on a multiprocessor, each on the tensor cores while the other is at its softmax."""
    config = prefill.config_of(128, 2)
    binary = compiled(
        prefill._prefill_kernel,
        VALUES | {'block_table': '*i32', 'tiles': '*i32'} | dict.fromkeys(('k_pages', 'v_pages'), plane(True, 128)),
        NUMBERS | dict(HEADS=8, GROUP=4, M=config.rows, D=128, D_P=128, R=0, BLOCK=64, TILE=64, WINDOW=0,
                       STAGES=config.num_stages, TMA=True, PRECISION='tf32', PDL=True),
        num_warps=config.num_warps)  # fmt: skip
    assert fits(binary, 2, tmp_path / 'prefill.ptx')
    assert 'wgmma.mma_async' in binary.asm['ptx']


PACKED = {'words': '*i16', 'meta': '*i32', 'y': '*bf16', 'parts': '*fp32', 'arrived': '*i32', 'M': 'i32'}
TILE = dict(bias=None, N=4096, K=4096, x_stride=4096, y_stride=4096, BN=128, GROUP=128, HALF=True, SPLIT=2,
            GATE='silu', HAS_BIAS=False, EVEN_K=True, PDL=True, ASM=True)  # fmt: skip


def in_registers(binary) -> bool:
    """Whether the loop multiplies with what each thread has unpacked, and nothing goes through shared memory for it."""
    text = binary.asm['ttgir']
    loop = text[text.index('scf.for') : text.index('scf.yield')]
    return 'local_alloc' not in loop and 'local_store' not in loop and 'wgmma.mma_async' in binary.asm['ptx']


@pytest.mark.parametrize(('bits', 'codes', 'run'), [(4, 4, 4), (2, 8, 4), (3, 5, 1), (8, 2, 2)])
def test_packed_codes(bits, codes, run, tmp_path):
    binary = compiled(
        packed._packed_kernel, PACKED | {'x': '*bf16'},
        TILE | dict(BM=16, CODES=codes, BITS=bits, FLOAT8='', RUN=run, ZEROS=True, KIND='bf16', AHEAD=4096, FOLD=False,
                    STAGES=4),
        num_warps=8, num_stages=4)  # fmt: skip
    assert in_registers(binary) and fits(binary, 2, tmp_path / 'packed.ptx')


def test_packed_codes_for_many_rows(tmp_path):
    """Weights are scaled, so that nothing waits for a product but the next ones."""
    binary = compiled(
        packed._packed_kernel, PACKED | {'x': '*bf16'},
        TILE | dict(BM=256, CODES=4, BITS=4, FLOAT8='', RUN=4, ZEROS=True, KIND='bf16', AHEAD=0, FOLD=True, STAGES=3),
        num_warps=8, num_stages=3)  # fmt: skip
    assert in_registers(binary) and fits(binary, 1, tmp_path / 'many.ptx')
    assert 'pendings = 7' in binary.asm['ttgir']


@pytest.mark.parametrize(('bits', 'group', 'columns'), [(4, 128, 128), (8, 0, 256)])
def test_packed_codes_with_inputs_of_8_bits(bits, group, columns, tmp_path):
    binary = compiled(packed_codes._codes_kernel, PACKED | {'x': '*i8', 'x_scales': '*fp32'},
                      TILE | dict(BM=columns, BITS=bits, SIGNED=True, GROUP=group, SPLIT=1, STAGES=3), num_warps=8,
                      num_stages=3)  # fmt: skip
    assert in_registers(binary) and fits(binary, 1, tmp_path / 'codes.ptx')
    assert 's32.s8.s8' in binary.asm['ptx']
