"""What we write, transformers reads with compressed-tensors, and computes the same."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.config.quantization import PACK, Storage
from lmdeploy.lite.report import loads_in
from lmdeploy.lite.rotated import GPTQ
from tests.lite.runs import RECIPES, options, run
from tests.models.driver import Driver, load_model

IDS = torch.arange(20, 60)
SYMMETRIC = {bits: Storage(PACK, bits=bits, group=32) for bits in (2, 3, 4, 8)}


def both(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Our logits and theirs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(IDS[None]).logits[0].float()
    return Driver(load_model(folder)).sequence(IDS.tolist()), theirs


@pytest.mark.parametrize('bits', SYMMETRIC)
def test_packed_weights(toy, text, tmp_path, bits):
    run(toy, GPTQ(SYMMETRIC[bits], 'portable' if bits == 4 else 'none'), options(tmp_path / 'out', text))
    ours, theirs = both(tmp_path / 'out')
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert loads_in(SYMMETRIC[bits], False)['transformers'] == 'yes'


@pytest.mark.parametrize('name', ['compressed int8', 'compressed fp8'])
def test_weights_and_inputs_of_8_bits(toy, text, tmp_path, name):
    run(toy, RECIPES[name](), options(tmp_path / 'out', text))
    ours, theirs = both(tmp_path / 'out')
    assert (ours - theirs).norm() < 0.05 * ours.norm()  # their scales of inputs are rounded in another order


def test_what_it_cannot_read_the_report_does_not_promise(toy, text, tmp_path):
    """Run-time transforms are ignored in silence, and packed zero points have the wrong shape: a change of either is
    one of the table's."""
    native = GPTQ(SYMMETRIC[4], 'native')
    run(toy, native, options(tmp_path / 'native', text))
    ours, theirs = both(tmp_path / 'native')
    assert (ours - theirs).norm() > 0.5 * ours.norm()
    assert loads_in(native.storage(0, 'qkv'), False)['transformers'] != 'yes'
    run(toy, RECIPES['w3'](), options(tmp_path / 'w3', text))
    with pytest.raises(RuntimeError, match='mismatched'):
        both(tmp_path / 'w3')
    assert loads_in(RECIPES['w3']().form, False)['transformers'] != 'yes'
