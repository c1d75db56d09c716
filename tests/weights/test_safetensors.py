"""safetensors: what the reference writer writes is read back; nothing else gets past the header check."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdeploy.errors import LmdeployError, LoadError
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.checkpoint import DTYPES, open_checkpoint
from lmdeploy.weights.safetensors import ITEM_SIZES, read_header
from tests.weights.files import mutations, safetensors_bytes, write_folder

EXAMPLES = 300
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


def entry(dtype: object, shape: object, offsets: object) -> dict:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


def code_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(LoadError) as caught:
        read_header(ByteFile(path))
    assert path.name in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize('dtype', FLOATS + INTEGERS, ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        'a.weight': torch.randint(0, 100, (5, 3)).to(dtype),
        'a.bias': torch.randint(0, 2, (3,)).to(dtype),
        'empty': torch.empty(0, 4, dtype=dtype),
        'scalar': torch.tensor(1).to(dtype),
    }
    write_folder(tmp_path, tensors)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == sorted(tensors)
        for name, wanted in tensors.items():
            found = checkpoint.get(name)
            assert found.dtype == dtype and found.shape == wanted.shape
            assert bytes(found.reshape(-1).view(torch.uint8)) == bytes(wanted.reshape(-1).view(torch.uint8))
            assert checkpoint.raw(name).dtype_name in ITEM_SIZES


def test_every_known_type_has_its_size() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_SIZES


def test_metadata_is_allowed(tmp_path: Path) -> None:
    header = {'__metadata__': {'format': 'pt', 'config': '{"a": [1, 2]}'}, 'a': entry('U8', [2], [0, 2])}
    path = tmp_path / 'm.safetensors'
    path.write_bytes(safetensors_bytes(header, b'xy'))
    assert list(read_header(ByteFile(path))) == ['a']


HEADERS: dict[str, tuple[object, bytes, str]] = {
    'not JSON': (b'{"a": ', b'', 'LMD-124'),
    'not an object': (b'[1]', b'', 'LMD-124'),
    'leading blank': (b' {}', b'', 'LMD-124'),
    'not UTF-8': (b'{"\xff": 1}', b'', 'LMD-124'),
    'NaN': (b'{"a": NaN}', b'', 'LMD-124'),
    'a fraction': (b'{"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}', b'x', 'LMD-124'),
    'deep nesting': (b'{"a":' * 20000 + b'1' + b'}' * 20000, b'', 'LMD-124'),
    'deep lists': (b'{"a":' + b'[' * 20000 + b']' * 20000 + b'}', b'', 'LMD-124'),
    'a number of 10,000 digits': (b'{"a": ' + b'9' * 10000 + b'}', b'', 'LMD-124'),
    'two tensors of one name': (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b'x',
        'LMD-135',
    ),
    'a key twice': (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b'x', 'LMD-124'),
    'metadata that are no strings': ({'__metadata__': {'a': 1}}, b'', 'LMD-124'),
    'entry is a list': ({'a': []}, b'', 'LMD-125'),
    'entry lacks a key': ({'a': {'dtype': 'U8', 'shape': [1]}}, b'', 'LMD-125'),
    'entry has a key too many': ({'a': entry('U8', [1], [0, 1]) | {'x': 1}}, b'x', 'LMD-125'),
    'unknown type': ({'a': entry('Q4', [1], [0, 1])}, b'x', 'LMD-125'),
    'type is a list': ({'a': entry(['U8'], [1], [0, 1])}, b'x', 'LMD-125'),
    'empty name': ({'': entry('U8', [1], [0, 1])}, b'x', 'LMD-125'),
    'name of 5,000 dots': ({'.' * 5000: entry('U8', [1], [0, 1])}, b'x', 'LMD-125'),
    'name with a lone surrogate': (
        b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b'x',
        'LMD-125',
    ),
    'negative size': ({'a': entry('U8', [-1, -1], [0, 1])}, b'x', 'LMD-125'),
    'size is true': ({'a': entry('U8', [True], [0, 1])}, b'x', 'LMD-125'),
    'size overflows 64 bits': ({'a': entry('U8', [1 << 63, 2], [0, 0])}, b'', 'LMD-125'),
    'sizes overflow together': ({'a': entry('U8', [1 << 32, 1 << 32], [0, 0])}, b'', 'LMD-125'),
    'nine dimensions': ({'a': entry('U8', [1] * 9, [0, 1])}, b'x', 'LMD-125'),
    'shape disagrees with range': ({'a': entry('F32', [2], [0, 4])}, b'xxxx', 'LMD-125'),
    'range runs backwards': ({'a': entry('U8', [1], [1, 0])}, b'x', 'LMD-125'),
    'three offsets': ({'a': entry('U8', [1], [0, 1, 2])}, b'x', 'LMD-125'),
    'range beyond the file': ({'a': entry('U8', [10], [0, 10])}, b'x', 'LMD-123'),
    'overlap': ({'a': entry('U8', [2], [0, 2]), 'b': entry('U8', [2], [1, 3])}, b'xyz', 'LMD-125'),
    'the same range twice': ({'a': entry('U8', [1], [0, 1]), 'b': entry('U8', [1], [0, 1])}, b'x', 'LMD-125'),
    'gap': ({'a': entry('U8', [1], [0, 1]), 'b': entry('U8', [1], [2, 3])}, b'xyz', 'LMD-125'),
    'bytes at the end': ({'a': entry('U8', [1], [0, 1])}, b'xy', 'LMD-124'),
}


@pytest.mark.parametrize('case', HEADERS)
def test_bad_header(tmp_path: Path, case: str) -> None:
    header, data, code = HEADERS[case]
    assert code_of(tmp_path / 'm.safetensors', safetensors_bytes(header, data)) == code


@pytest.mark.parametrize(
    ('content', 'code'),
    [
        (b'', 'LMD-123'),
        (b'abc', 'LMD-123'),
        (struct.pack('<Q', 0), 'LMD-124'),
        (struct.pack('<Q', 50) + b'{}', 'LMD-123'),
        (struct.pack('<Q', 100_000_001) + b'{}', 'LMD-124'),
        (struct.pack('<Q', (1 << 64) - 1) + b'{}', 'LMD-124'),
    ],
)
def test_bad_length(tmp_path: Path, content: bytes, code: str) -> None:
    assert code_of(tmp_path / 'm.safetensors', content) == code


@pytest.mark.parametrize('unit', [b'[],', b'{},', b'0,'])
def test_a_hostile_header_costs_no_more_than_its_size(tmp_path: Path, unit: bytes) -> None:
    """Lists of nothing would take 20 times the memory of their text; they are refused unparsed."""
    text = b'{"a": [' + unit * 4_000_000 + b'0]}'
    tracemalloc.start()
    code = code_of(tmp_path / 'm.safetensors', safetensors_bytes(text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 'LMD-124' and peak < 5 * len(text)


def valid_file() -> bytes:
    tensors = {f'layers.{i}.weight': entry('F32', [2, 2], [16 * i, 16 * i + 16]) for i in range(4)}
    return safetensors_bytes({'__metadata__': {'format': 'pt'}, **tensors}, bytes(64))


VALID = valid_file()


@pytest.mark.parametrize('cut', range(0, len(VALID), 7))
def test_truncated_anywhere(tmp_path: Path, cut: int) -> None:
    code_of(tmp_path / 'm.safetensors', VALID[:cut])


@given(content=mutations(VALID, len(VALID) - 64) | st.binary(max_size=64))
@settings(max_examples=EXAMPLES, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_header_never_escapes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'model.safetensors').write_bytes(content)
    try:
        checkpoint = open_checkpoint(tmp_path)
    except LmdeployError:
        return
    with checkpoint:
        for name in checkpoint.names():
            assert checkpoint.get(name).nbytes <= len(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(['F32', 'BF16', 'U8']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries({'dtype': json_values, 'shape': json_values, 'data_offsets': json_values}) | json_values


names = st.text(max_size=8) | st.just('__metadata__')


@given(header=st.dictionaries(names, entries, max_size=4), data=st.binary(max_size=8))
@settings(max_examples=EXAMPLES, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_json_never_escapes(tmp_path: Path, header: dict, data: bytes) -> None:
    path = tmp_path / 'm.safetensors'
    path.write_bytes(safetensors_bytes(json.dumps(header).encode(), data))
    file = ByteFile(path)
    try:
        found = read_header(file)
    except LmdeployError:
        return
    finally:
        file.close()
    assert sum(one.nbytes for one in found.values()) == len(data)
