"""The Checkpoint face: cursors, shapes, types, accounting, threads, memory."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.errors import LoadError
from lmdeploy.weights.checkpoint import Checkpoint, open_checkpoint
from tests.weights.files import write_folder

TENSORS = {
    'model.embed.weight': torch.arange(12.0).view(4, 3),
    'model.layers.0.proj.weight': torch.arange(6.0).view(2, 3).bfloat16(),
    'model.layers.0.proj.bias': torch.arange(2.0),
    'model.layers.10.proj.weight': torch.arange(6).view(2, 3),
    'scale': torch.tensor(2.0),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_folder(tmp_path, TENSORS))


def test_cursor(checkpoint: Checkpoint) -> None:
    top = checkpoint.prefix()
    assert top.tensors() == ['scale']
    assert top.has('model') and top.has('model.layers.10') and top.has('scale')
    assert not top.has('model.layers.1') and not top.has('mode') and not top.has('scale.x')
    proj = top.child('model').child('layers').child('0').child('proj')
    assert proj.path == 'model.layers.0.proj' == checkpoint.prefix('model').child('layers.0.proj').path
    assert proj.tensors() == ['bias', 'weight']
    assert proj.has('weight') and not proj.has('scales')
    assert proj.shape('weight') == (2, 3) and proj.dtype_name('weight') == 'BF16'
    assert top.child('nothing').tensors() == []


def test_every_tensor_is_accounted_for(checkpoint: Checkpoint) -> None:
    proj = checkpoint.prefix('model.layers.0.proj')
    proj.get('weight'), proj.raw('bias'), proj.shape('weight')
    left = ['model.embed.weight', 'model.layers.10.proj.weight', 'scale']
    assert checkpoint.leftover() == left
    with pytest.raises(LoadError) as caught:
        checkpoint.finish(ignore=(r'^scale$',))
    assert caught.value.code == 'LMD-134'
    assert all(name in str(caught.value) for name in left[:2]) and '2 tensors' in str(caught.value)
    checkpoint.finish(ignore=(r'^scale$', r'embed', r'layers\.10\.'))


def test_looking_at_a_tensor_does_not_use_it(checkpoint: Checkpoint) -> None:
    top = checkpoint.prefix()
    top.has('scale'), top.shape('scale'), top.dtype_name('scale'), top.tensors()
    with pytest.raises(LoadError):
        top.get('scale', (3,))
    assert checkpoint.leftover() == sorted(TENSORS)


def test_types(checkpoint: Checkpoint) -> None:
    proj = checkpoint.prefix('model.layers.0.proj')
    assert proj.get('weight').dtype == torch.bfloat16
    assert proj.get('weight', (2, 3), torch.float16).dtype == torch.float16
    assert checkpoint.prefix('model.layers.10.proj').get('weight').dtype == torch.int64


def test_shape_error_names_everything(checkpoint: Checkpoint) -> None:
    proj = checkpoint.prefix('model.layers.0.proj')
    for wanted in [(3, 2), (2,), (2, 3, 1), (None, 4), ()]:
        with pytest.raises(LoadError) as caught:
            proj.get('weight', wanted)
        text = str(caught.value)
        assert caught.value.code == 'LMD-133'
        assert 'model.layers.0.proj.weight' in text and '[2, 3]' in text and 'model.safetensors' in text
    assert proj.get('weight', (None, 3)).shape == (2, 3)
    assert checkpoint.prefix().get('scale', ()).item() == 2


def test_missing_tensor_is_named(checkpoint: Checkpoint) -> None:
    for pull in ('get', 'raw', 'shape', 'dtype_name'):
        with pytest.raises(LoadError) as caught:
            getattr(checkpoint.prefix('model.layers.3'), pull)('weight')
        assert caught.value.code == 'LMD-132' and 'model.layers.3.weight' in str(caught.value)


def test_tensors_outlive_the_checkpoint(checkpoint: Checkpoint) -> None:
    kept = checkpoint.get('model.embed.weight')
    checkpoint.close()
    assert torch.equal(kept, TENSORS['model.embed.weight'])
    with pytest.raises(LoadError) as caught:
        checkpoint.get('scale')
    assert caught.value.code == 'LMD-139'


def test_writing_to_a_tensor_changes_no_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, TENSORS)
    before = (folder / 'model.safetensors').read_bytes()
    checkpoint = open_checkpoint(folder)
    checkpoint.get('scale').fill_(0)
    assert (folder / 'model.safetensors').read_bytes() == before
    assert checkpoint.get('scale').item() == 2


def test_a_file_that_shrinks_while_loading_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {'a': torch.zeros(1 << 16)})
    checkpoint = open_checkpoint(folder)
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LoadError) as caught:
        checkpoint.get('a')
    assert caught.value.code == 'LMD-123'


def test_threads(tmp_path: Path) -> None:
    tensors = {f'{i}': torch.full((1000,), float(i)) for i in range(200)}
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, shards=3))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(checkpoint.get, tensors))
    assert all(torch.equal(a, b) for a, b in zip(found, tensors.values()))
    checkpoint.finish()


paths = st.lists(st.sampled_from(['a', 'b', '0', '10', 'weight']), min_size=1, max_size=4).map('.'.join)


@given(names=st.sets(paths, max_size=8), probe=paths)
def test_prefixes_are_those_of_the_names(names: set[str], probe: str) -> None:
    top = Checkpoint(Path('x'), dict.fromkeys(names), {}, {}).prefix()  # type: ignore[arg-type]
    below = [name.removeprefix(probe + '.') for name in names if name.startswith(probe + '.')]
    assert top.has(probe) == (probe in names or bool(below))
    assert top.child(probe).tensors() == sorted(name for name in below if '.' not in name)
    assert top.tensors() == sorted(name for name in names if '.' not in name)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from lmdeploy.weights.checkpoint import open_checkpoint
checkpoint = open_checkpoint(Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint.get('warm', dtype=torch.bfloat16)
before = peak()
kept = [checkpoint.get(name, dtype=torch.bfloat16) for name in checkpoint.names()]
print((peak() - before) / sum(tensor.nbytes for tensor in kept))
"""


def test_loading_takes_the_memory_of_the_result(tmp_path: Path) -> None:
    """No second copy of the file stays resident: 100 MB of bfloat16 raise the peak by little more than 100 MB."""
    tensors = {f'{i}': torch.zeros(5 << 20, dtype=torch.bfloat16) for i in range(10)} | {'warm': torch.zeros(4)}
    folder = write_folder(tmp_path, tensors)
    command = [sys.executable, '-c', MEASURE, folder]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.2
