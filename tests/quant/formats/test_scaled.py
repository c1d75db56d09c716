"""int8 and float8 weights with scales: the three formats that hold them, by definition, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy.config.quantization import FLOAT, FP8, INT, SMOOTH, Storage
from lmdeploy.errors import LoadError
from lmdeploy.quant.policy import FORMATS
from tests.quant.formats.packers import fp8_blocks, fp8_rows, int8_rows, random_codes
from tests.quant.formats.test_dense_gguf import saved

E4M3, E5M2 = 'float8_e4m3fn', 'float8_e5m2'
WEIGHT = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))


def check(folder: Path, storage: Storage, tensors: dict[str, torch.Tensor], dense: torch.Tensor) -> None:
    """The file loads as ``dense``, and is written as it was read."""
    form = FORMATS[storage.format](storage)
    tensors = tensors | {'bias': torch.randn(len(dense))}
    assert form.detect(list(tensors)) and not form.detect(['weight', 'bias']) and not form.detect(['qweight'])
    prefix = saved(folder, tensors)
    bundle = form.load(prefix, torch.float32)
    prefix.checkpoint.finish()
    assert form.describe(prefix, torch.float32).scheme == bundle.scheme
    assert (bundle.out_features, bundle.in_features) == tuple(dense.shape)
    assert bundle.scales.shape[1] == len(dense) and bundle.stored.shape == dense.shape[::-1]
    assert torch.equal(form.dequant(bundle), dense)
    assert torch.equal(bundle.bias, tensors['bias'])
    back = form.save(bundle)
    assert {name: t.float().tolist() for name, t in back.items()} == {n: t.float().tolist() for n, t in tensors.items()}
    assert {name: (t.dtype, t.shape) for name, t in back.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize(('form', 'scale'), [(SMOOTH, 'scale'), (INT, 'weight_scale')])
def test_int8_per_output(tmp_path: Path, form: str, scale: str) -> None:
    codes, scales = int8_rows(WEIGHT)
    check(tmp_path, Storage(form, activation='int8'), {'weight': codes, scale: scales}, codes.float() * scales)


@pytest.mark.parametrize(('form', 'scale'), [(SMOOTH, 'scale'), (FLOAT, 'weight_scale'), (FP8, 'weight_scale')])
def test_float8_per_output(tmp_path: Path, form: str, scale: str) -> None:
    codes, scales = fp8_rows(WEIGHT)
    storage = Storage(form, E4M3, rows=0 if form == FP8 else 1, activation=E4M3)
    check(tmp_path, storage, {'weight': codes, scale: scales}, codes.float() * scales)


def test_e5m2(tmp_path: Path) -> None:
    scales = WEIGHT.abs().amax(1, keepdim=True) / 57344
    codes = (WEIGHT / scales).to(torch.float8_e5m2)
    storage = Storage(SMOOTH, E5M2, activation=E5M2)
    check(tmp_path, storage, {'weight': codes, 'scale': scales}, codes.float() * scales)


@pytest.mark.parametrize('form', [FLOAT, FP8])
@pytest.mark.parametrize('static', [True, False])
def test_float8_with_one_scale(tmp_path: Path, form: str, static: bool) -> None:
    scale = WEIGHT.abs().max().reshape(1) / 448
    codes = (WEIGHT / scale).to(torch.float8_e4m3fn)
    given = {'input_scale': torch.tensor([0.25])} if static else {}
    storage = Storage(form, E4M3, rows=0, activation=E4M3, static=static)
    check(tmp_path, storage, {'weight': codes, 'weight_scale': scale} | given, codes.float() * scale)


@pytest.mark.parametrize(('form', 'scale'), [(FP8, 'weight_scale_inv'), (FLOAT, 'weight_scale')])
@pytest.mark.parametrize('block', [16, 25, 64])
def test_float8_in_blocks_with_ragged_edges(tmp_path: Path, form: str, scale: str, block: int) -> None:
    codes, scales, dense = fp8_blocks(WEIGHT, block)
    storage = Storage(form, E4M3, group=block, rows=block, activation=E4M3, activation_group=block)
    check(tmp_path, storage, {'weight': codes, scale: scales}, dense)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize(('bits', 'group'), [(4, 0), (4, 25), (8, 10)])
def test_integers_of_any_width_in_int8(tmp_path: Path, symmetric: bool, bits: int, group: int) -> None:
    codes, middle = random_codes(50, 40, bits, group, symmetric, scale_type=torch.bfloat16), 1 << bits - 1
    tensors = {'weight': (codes.codes.t() - middle).to(torch.int8), 'weight_scale': codes.scales.t().contiguous()}
    if not symmetric:
        tensors['weight_zero_point'] = (codes.zeros.t() - middle).to(torch.int8)
    check(tmp_path, Storage(INT, bits=bits, group=group, symmetric=symmetric),
          {name: t.contiguous() for name, t in tensors.items()}, codes.weight)  # fmt: skip


def test_zero_points_of_old_symmetric_files(tmp_path: Path) -> None:
    """Older writers stored zero points of 0 beside symmetric weights."""
    codes, scales = int8_rows(WEIGHT)
    tensors = {'weight': codes, 'weight_scale': scales, 'weight_zero_point': torch.zeros(40, 1, dtype=torch.int8)}
    form = FORMATS[INT](Storage(INT))
    prefix = saved(tmp_path / 'a', tensors)
    assert form.load(prefix, torch.float32).zeros is None
    prefix.checkpoint.finish()
    tensors['weight_zero_point'][3] = 1
    with pytest.raises(LoadError, match=r'LMD-142.*it is symmetric, but weight_zero_point is not zero'):
        form.load(saved(tmp_path / 'b', tensors), torch.float32)


@pytest.mark.parametrize(('change', 'code', 'text'), [
    ({'weight': WEIGHT}, 'LMD-140', 'F32; the format smooth_quant needs I8'),
    ({'scale': torch.ones(41, 1)}, 'LMD-133', '[41, 1]'),
    ({'scale': torch.ones(40, 1, dtype=torch.int8)}, 'LMD-140', 'layer.scale'),
    ({'bias': torch.ones(41)}, 'LMD-133', 'layer.bias'),
])
def test_bad_files_are_named(tmp_path: Path, change: dict, code: str, text: str) -> None:
    codes, scales = int8_rows(WEIGHT)
    with pytest.raises(LoadError) as caught:
        FORMATS[SMOOTH](Storage(SMOOTH, activation='int8')).load(
            saved(tmp_path, {'weight': codes, 'scale': scales} | change), torch.float32)
    assert caught.value.code == code and text in str(caught.value)


def test_what_blocks_cannot_hold(tmp_path: Path) -> None:
    codes, scales = fp8_rows(WEIGHT)
    rows = FORMATS[FP8](Storage(FP8, E4M3, rows=0, activation=E4M3))
    bundle = rows.load(saved(tmp_path, {'weight': codes, 'weight_scale': scales}), torch.float32)
    with pytest.raises(ValueError, match='blocks of 16 outputs'):
        FORMATS[FP8](Storage(FP8, E4M3, rows=16, group=64)).save(bundle)
    with pytest.raises(ValueError, match='one scale for the whole weight'):
        FORMATS[FLOAT](Storage(FLOAT, E4M3, rows=0)).save(bundle)
