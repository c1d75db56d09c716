"""Model folders: which files are opened, which are refused, and that nothing else is ever touched."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy.errors import LoadError
from lmdeploy.weights.checkpoint import open_checkpoint
from tests.weights.files import write_folder

INDEX = 'model.safetensors.index.json'
TENSORS = {f'layers.{i}.weight': torch.full((2, 3), float(i)) for i in range(6)}


def failure(path: Path) -> LoadError:
    with pytest.raises(LoadError) as caught:
        open_checkpoint(path)
    return caught.value


def edit_index(folder: Path, **changes: object) -> None:
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(content | changes))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    with open_checkpoint(write_folder(tmp_path, TENSORS, shards=3)) as checkpoint:
        assert checkpoint.names() == sorted(TENSORS)
        assert all(torch.equal(checkpoint.get(name), TENSORS[name]) for name in TENSORS)


def test_config_and_generation_config(tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS, config={'hidden_size': 3})
    assert open_checkpoint(tmp_path).generation_config == {}
    (tmp_path / 'generation_config.json').write_text('\ufeff{"eos_token_id": 7}', encoding='utf-8')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == {'hidden_size': 3}
    assert checkpoint.generation_config == {'eos_token_id': 7}


@pytest.mark.parametrize('name', ['config.json', 'generation_config.json', INDEX])
@pytest.mark.parametrize(
    'content', [b'', b'{', b'[]', b'null', b'\xff\xfe', b'[' * 100_000, b'{"a": ' + b'1' * 9999 + b'}']
)
def test_bad_json(tmp_path: Path, name: str, content: bytes) -> None:
    write_folder(tmp_path, TENSORS, shards=2)
    (tmp_path / name).write_bytes(content)
    error = failure(tmp_path)
    assert error.code == 'LMD-122' and name in str(error)


def test_config_is_missing(tmp_path: Path) -> None:
    (write_folder(tmp_path, TENSORS) / 'config.json').unlink()
    assert failure(tmp_path).code == 'LMD-122'


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS, shards=3)
    (tmp_path / 'model-00002-of-00003.safetensors').unlink()
    error = failure(tmp_path)
    assert error.code == 'LMD-127' and 'model-00002-of-00003.safetensors' in str(error) and '1 of the 3' in str(error)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = write_folder(tmp_path, TENSORS, shards=3) / 'model-00003-of-00003.safetensors'
    shard.write_bytes(shard.read_bytes()[:-1])
    error = failure(tmp_path)
    assert error.code == 'LMD-123' and shard.name in str(error)


def test_swapped_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS, shards=2)
    one, two = (tmp_path / f'model-0000{i}-of-00002.safetensors' for i in (1, 2))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b), two.write_bytes(a)
    assert failure(tmp_path).code == 'LMD-136'


def test_tensor_that_the_index_does_not_know(tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS, shards=2)
    weight_map = json.loads((tmp_path / INDEX).read_text())['weight_map']
    weight_map.pop('layers.0.weight')
    edit_index(tmp_path, weight_map=weight_map)
    error = failure(tmp_path)
    assert error.code == 'LMD-136' and 'layers.0.weight' in str(error)


@pytest.mark.parametrize(('total', 'code'), [(143, 'LMD-136'), ('144', 'LMD-126'), (True, 'LMD-126'), ([], 'LMD-126')])
def test_total_size_is_exact(tmp_path: Path, total: object, code: str) -> None:
    write_folder(tmp_path, TENSORS, shards=2)
    edit_index(tmp_path, metadata={'total_size': total})
    assert failure(tmp_path).code == code


@pytest.mark.parametrize('metadata', [None, {}, {'total_size': 144}, {'total_size': 144.0}])
def test_total_size_is_optional(tmp_path: Path, metadata: object) -> None:
    write_folder(tmp_path, TENSORS, shards=2)
    edit_index(tmp_path, metadata=metadata)
    assert len(open_checkpoint(tmp_path).names()) == 6


@pytest.mark.parametrize(
    ('shard', 'code'),
    [
        ('../model.safetensors', 'LMD-128'),
        ('/etc/passwd', 'LMD-128'),
        ('sub/model.safetensors', 'LMD-128'),
        ('..\\model.safetensors', 'LMD-128'),
        ('..', 'LMD-128'),
        ('a\0.safetensors', 'LMD-128'),
        ('\ud800.safetensors', 'LMD-128'),
        ('x' * 300 + '.safetensors', 'LMD-128'),
        ('pytorch_model.bin', 'LMD-128'),
        ('', 'LMD-126'),
        (3, 'LMD-126'),
        (None, 'LMD-126'),
    ],
)
def test_shard_names_are_plain(tmp_path: Path, shard: object, code: str) -> None:
    write_folder(tmp_path, TENSORS, shards=2)
    edit_index(tmp_path, weight_map={'layers.0.weight': shard})
    assert failure(tmp_path).code == code


@pytest.mark.parametrize('weight_map', [None, [], {}, 'x'])
def test_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    write_folder(tmp_path, TENSORS, shards=2)
    edit_index(tmp_path, weight_map=weight_map)
    assert failure(tmp_path).code == 'LMD-126'


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'generation_config.json'])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / 'model', TENSORS)
    outside = tmp_path / 'outside'
    outside.write_text('{}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    error = failure(folder)
    assert error.code == 'LMD-128' and name in str(error)


def test_linked_shard_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'model', TENSORS, shards=2)
    shard = folder / 'model-00001-of-00002.safetensors'
    shard.rename(tmp_path / 'outside')
    shard.symlink_to(tmp_path / 'outside')
    assert failure(folder).code == 'LMD-128'


def test_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS)
    (tmp_path / 'model.safetensors').rename(tmp_path / 'data')
    (tmp_path / 'model.safetensors').symlink_to('data')
    assert len(open_checkpoint(tmp_path).names()) == 6


def hub_cache(root: Path) -> Path:
    """The layout of a Hugging Face cache entry: snapshots of links to blobs."""
    snapshot = write_folder(root / 'models--org--name' / 'snapshots' / 'abc', TENSORS, shards=2)
    blobs = root / 'models--org--name' / 'blobs'
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path('../../blobs') / str(i))
    return snapshot


def test_hub_cache_links_work(tmp_path: Path) -> None:
    assert len(open_checkpoint(hub_cache(tmp_path)).names()) == 6


def test_hub_cache_links_stay_within_their_entry(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (tmp_path / 'secret').write_text('{}')
    (snapshot / 'generation_config.json').symlink_to('../../../secret')
    assert failure(snapshot).code == 'LMD-128'


def test_a_folder_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    write_folder(tmp_path / 'real', TENSORS)
    (tmp_path / 'link').symlink_to('real')
    assert len(open_checkpoint(tmp_path / 'link').names()) == 6


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS)
    (tmp_path / 'model.safetensors').unlink()
    os.mkfifo(tmp_path / 'model.safetensors')
    assert failure(tmp_path).code == 'LMD-139'


class Canary:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def poison(folder: Path, names: list[str]) -> Path:
    canary = folder / 'canary'
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    np.save(folder / 'stats.npy', np.array([Canary(canary)], dtype=object))
    (folder / 'modeling.py').write_text(f'open({str(canary)!r}, "w")')
    pickle.loads(pickle.dumps(Canary(canary)))  # the bait works
    canary.unlink()
    return canary


@pytest.mark.parametrize('suffix', ['.bin', '.pth', '.pt', '.ckpt'])
def test_pickles_alone_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    canary = poison(tmp_path, [f'model{suffix}', 'training_args.bin'])
    (tmp_path / 'config.json').write_text('{"auto_map": {"AutoConfig": "modeling.Config"}}')
    error = failure(tmp_path)
    assert error.code == 'LMD-121' and f'model{suffix}' in str(error)
    assert failure(tmp_path / f'model{suffix}').code == 'LMD-121'
    assert not canary.exists()


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS, config={'auto_map': {'AutoConfig': 'modeling.Config'}})
    canary = poison(tmp_path, ['pytorch_model.bin', 'training_args.bin', 'inputs_stats.pth'])
    with open_checkpoint(tmp_path) as checkpoint:
        for name in checkpoint.names():
            checkpoint.get(name)
    assert not canary.exists()


@pytest.mark.parametrize(
    ('present', 'told'), [('x.gguf', 'x.gguf'), ('a-00001-of-2.safetensors', INDEX), ('readme', 'model.safetensors')]
)
def test_no_weights(tmp_path: Path, present: str, told: str) -> None:
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / present).write_text('')
    error = failure(tmp_path)
    assert error.code == 'LMD-120' and told in str(error)


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    assert failure(tmp_path / 'absent.gguf').code == 'LMD-139'
    single = write_folder(tmp_path, TENSORS) / 'model.safetensors'
    assert failure(single).code == 'LMD-120'


def test_a_hundred_shards_are_checked_in_two_seconds(tmp_path: Path) -> None:
    tensors = {f'model.layers.{i}.mlp.experts.{j}.weight': torch.zeros(1) for i in range(100) for j in range(100)}
    write_folder(tmp_path, tensors, shards=100)
    start = time.perf_counter()
    checkpoint = open_checkpoint(tmp_path)
    assert time.perf_counter() - start < 2
    assert len(checkpoint.names()) == 10_000
    checkpoint.close()


def test_every_error_has_both_languages(tmp_path: Path) -> None:
    from lmdeploy.texts.weights import TEXTS

    for texts in TEXTS.values():
        fields = [{part[1] for part in _fields(text)} for text in (texts['en'], texts['zh'])]
        assert fields[0] == fields[1] and fields[0]


def _fields(text: str) -> list[tuple]:
    from string import Formatter

    return [part for part in Formatter().parse(text) if part[1]]
