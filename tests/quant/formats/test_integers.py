"""AWQ, GPTQ and packed compressed-tensors: files written from the definitions load, dequantise and save as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmdeploy.config.quantization import AWQ, GPTQ, PACK, Storage
from lmdeploy.errors import LoadError
from lmdeploy.quant.policy import FORMATS
from tests.quant.formats import packers
from tests.quant.formats.packers import Codes, random_codes
from tests.quant.formats.test_dense_gguf import assert_equal, saved


@dataclass
class Case:
    """A format, its parameters, and the writer of its files."""

    storage: Storage
    write: Callable[[Codes], dict[str, Tensor]]
    shuffled: bool = False

    def codes(self, inputs: int = 96, outputs: int = 40) -> Codes:
        storage = self.storage
        return random_codes(inputs, outputs, storage.bits, storage.group, storage.symmetric, shuffled=self.shuffled,
                            least_zero=storage.zero_shift)  # fmt: skip


def cases() -> dict[str, Case]:
    found = {}
    for symmetric in (True, False):
        kind = 'sym' if symmetric else 'asym'
        for group in (0, 32, 16):
            storage = Storage(AWQ, bits=4, group=group, symmetric=symmetric)
            found[f'awq-{kind}-{group}'] = Case(storage, packers.awq)
        for bits in (2, 3, 4, 8):
            for version in (1, 2):
                storage = Storage(GPTQ, bits=bits, group=32, symmetric=symmetric, zero_shift=2 - version)
                found[f'gptq-v{version}-{bits}-{kind}'] = Case(storage, lambda c, v=version: packers.gptq(c, v))
        found[f'gptq-{kind}-act'] = Case(Storage(GPTQ, bits=4, group=32, symmetric=symmetric, zero_shift=1),
                                         lambda c: packers.gptq(c, 1), shuffled=True)  # fmt: skip
        for bits in range(2, 9):
            storage = Storage(PACK, bits=bits, group=32, symmetric=symmetric)
            found[f'packed-{bits}-{kind}'] = Case(storage, lambda c, s=symmetric: packers.compressed(c, s))
        for name, group in (('channel', 0), ('ragged', 36)):
            storage = Storage(PACK, bits=4, group=group, symmetric=symmetric)
            found[f'packed-{name}-{kind}'] = Case(storage, lambda c, s=symmetric: packers.compressed(c, s))
        found[f'packed-{kind}-act'] = Case(Storage(PACK, bits=4, group=32, symmetric=symmetric),
                                           lambda c, s=symmetric: packers.compressed(c, s), shuffled=True)  # fmt: skip
    found['gptq-whole'] = Case(Storage(GPTQ, bits=4, zero_shift=1), lambda c: packers.gptq(c, 1))
    return found


CASES = cases()


@pytest.mark.parametrize('case', CASES.values(), ids=list(CASES))
@pytest.mark.parametrize('bias', [True, False])
def test_files_by_definition(tmp_path: Path, case: Case, bias: bool) -> None:
    codes, form = case.codes(), FORMATS[case.storage.format](case.storage)
    tensors = case.write(codes) | ({'bias': torch.randn(40)} if bias else {})
    assert form.detect(list(tensors)) and not form.detect(['weight', 'bias'])
    prefix = saved(tmp_path / 'a', tensors)
    layout = form.describe(prefix, torch.float32)
    bundle = form.load(prefix, torch.float32)
    prefix.checkpoint.finish()
    assert (layout.out_features, layout.in_features) == (bundle.out_features, bundle.in_features) == (40, 96)
    assert layout.scheme == bundle.scheme and bundle.scheme.bits == case.storage.bits
    assert (bundle.zeros is None) == case.storage.symmetric and (bundle.perm is not None) == case.shuffled
    assert torch.equal(form.dequant(bundle), codes.weight)
    assert bias is (bundle.bias is not None) and (not bias or torch.equal(bundle.bias, tensors['bias']))
    back = form.save(bundle)
    assert {name: t.tolist() for name, t in back.items()} == {name: t.tolist() for name, t in tensors.items()}
    assert {name: t.dtype for name, t in back.items()} == {name: t.dtype for name, t in tensors.items()}
    assert_equal(form.load(saved(tmp_path / 'b', back), torch.float32), bundle)


def test_one_scale_for_a_packed_tensor(tmp_path: Path) -> None:
    storage = Storage(PACK, bits=4, rows=0)
    codes = random_codes(48, 16, 4, 0, True)
    codes.scales = codes.scales[:, :1].expand(1, 16)
    tensors = packers.compressed(codes, True) | {'weight_scale': codes.scales[0, :1].clone()}
    form = FORMATS[PACK](storage)
    bundle = form.load(saved(tmp_path / 'a', tensors), torch.float32)
    assert torch.equal(form.dequant(bundle), codes.weight)
    assert_equal(form.load(saved(tmp_path / 'b', form.save(bundle)), torch.float32), bundle)


def test_version_1_has_no_zero_point_0(tmp_path: Path) -> None:
    codes = random_codes(32, 8, 4, 32, False)
    codes.zeros[0, 3] = 0
    second = FORMATS[GPTQ](Storage(GPTQ, bits=4, group=32, symmetric=False))
    bundle = second.load(saved(tmp_path, packers.gptq(codes, 2)), torch.float32)
    first = FORMATS[GPTQ](Storage(GPTQ, bits=4, group=32, symmetric=False, zero_shift=1))
    with pytest.raises(ValueError, match='zero point of 0'):
        first.save(bundle)


def test_version_1_reads_15_as_16(tmp_path: Path) -> None:
    """What a careless writer of version 1 made of a zero point of 0; readers agree on 16."""
    codes = random_codes(32, 8, 4, 32, False)
    tensors = packers.gptq(codes, 2)
    tensors['qzeros'] = packers.rows(torch.full((1, 8), 15), 4)
    form = FORMATS[GPTQ](Storage(GPTQ, bits=4, group=32, symmetric=False, zero_shift=1))
    assert form.load(saved(tmp_path, tensors), torch.float32).zeros.unique().tolist() == [16]


BAD = {
    'scales of another group': ('awq-asym-32', {'scales': torch.ones(6, 40)}, 'LMD-133', '[6, 40]'),
    'zero points of another group': ('awq-asym-32', {'qzeros': torch.ones(6, 5, dtype=torch.int32)}, 'LMD-133', 'zero'),
    'codes of another type': ('awq-asym-32', {'qweight': torch.ones(96, 5, dtype=torch.int64)}, 'LMD-140', 'I64'),
    'codes of one dimension': ('awq-asym-32', {'qweight': torch.ones(96, dtype=torch.int32)}, 'LMD-133', 'qweight'),
    'no scales': ('awq-asym-32', {'scales': None}, 'LMD-132', 'scales'),
    'scales in integers': ('gptq-v1-4-sym', {'scales': torch.ones(3, 40, dtype=torch.int32)}, 'LMD-140', 'I32'),
    'words that hold no 3-bit codes': ('gptq-v1-3-sym', {'qweight': torch.ones(8, 40, dtype=torch.int32)}, 'LMD-142',
                                       '8 words'),
    'g_idx of another length': ('gptq-sym-act', {'g_idx': torch.zeros(95, dtype=torch.int32)}, 'LMD-133', 'g_idx'),
    'groups of unequal size': ('gptq-sym-act', {'g_idx': torch.zeros(96, dtype=torch.int32)}, 'LMD-142', 'g_idx'),
    'version 2 read as 1': ('gptq-v1-4-sym', {'qzeros': packers.rows(torch.full((3, 40), 8), 4)}, 'LMD-142',
                            'zero point 9'),
    'zero points where there are none': ('awq-sym-32', {'qzeros': packers.awq_rows(torch.full((3, 40), 7))}, 'LMD-142',
                                         'zero_point is false'),
    'a shape that does not fit': ('packed-4-sym', {'weight_shape': torch.tensor([40, 200])}, 'LMD-133',
                                  'weight_packed'),
    'a shape of nothing': ('packed-4-sym', {'weight_shape': torch.tensor([40, -96])}, 'LMD-142', 'weight_shape'),
    'no shape': ('packed-4-sym', {'weight_shape': None}, 'LMD-132', 'weight_shape'),
    'no zero points': ('packed-4-asym', {'weight_zero_point': None}, 'LMD-132', 'weight_zero_point'),
}  # fmt: skip


@pytest.mark.parametrize(('name', 'change', 'code', 'text'), BAD.values(), ids=list(BAD))
def test_bad_files_are_named(tmp_path: Path, name: str, change: dict, code: str, text: str) -> None:
    case = CASES[name]
    tensors = {k: v for k, v in (case.write(case.codes()) | change).items() if v is not None}
    form = FORMATS[case.storage.format](case.storage)
    with pytest.raises(LoadError) as caught:
        form.load(saved(tmp_path, tensors), torch.float32)
    chinese = caught.value.text('zh')
    assert caught.value.code == code and text in str(caught.value) and 'layer' in chinese
    assert code != 'LMD-142' or str(caught.value.params['reason']) not in chinese  # that part is told in Chinese too
