"""GGUF headers: what the reference writer writes is read back; nothing else gets past the checks."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdeploy.errors import LmdeployError, LoadError
from lmdeploy.weights import gguf as ours
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.checkpoint import open_checkpoint
from lmdeploy.weights.gguf import GGUFHeader, read_gguf_metadata
from tests.weights.files import mutations, write_gguf

EXAMPLES = 300


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack('<Q', len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack('<I', kind) + value


def record(name: str | bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


def build(entries: list[bytes] = (), records: list[bytes] = (), data: bytes = b'', **numbers: int) -> bytes:
    """A GGUF file of these parts; ``version``, ``tensors`` and ``keys`` override what its preamble says."""
    counts = numbers.get('tensors', len(records)), numbers.get('keys', len(entries))
    head = b'GGUF' + struct.pack('<IQQ', numbers.get('version', 3), *counts) + b''.join(entries) + b''.join(records)
    return head + bytes(-len(head) % 32) + data


def header_of(path: Path, content: bytes) -> GGUFHeader:
    path.write_bytes(content)
    file = ByteFile(path)
    try:
        return GGUFHeader(file)
    finally:
        file.close()


def failure(path: Path, content: bytes) -> LoadError:
    with pytest.raises(LoadError) as caught:
        header_of(path, content)
    assert path.name in str(caught.value)
    return caught.value


SCALARS = [(0, 'B', 255), (1, 'b', -1), (2, 'H', 65535), (3, 'h', -2), (4, 'I', 1 << 31), (5, 'i', -3), (6, 'f', 0.5),
           (7, '?', True), (10, 'Q', 1 << 63), (11, 'q', -4), (12, 'd', 0.1)]  # fmt: skip


def test_every_value_type(tmp_path: Path) -> None:
    entries = [entry(f'one.{kind}', kind, struct.pack('<' + code, value)) for kind, code, value in SCALARS]
    entries += [
        entry(f'many.{kind}', 9, struct.pack('<IQ' + code * 3, kind, 3, value, value, value))
        for kind, code, value in SCALARS
    ]
    entries.append(entry('text', 8, text('héllo ✓')))
    entries.append(entry('texts', 9, struct.pack('<IQ', 8, 2) + text('a') + text('')))
    inner = struct.pack('<IQ2B', 0, 2, 1, 2)
    entries.append(entry('nested', 9, struct.pack('<IQ', 9, 2) + inner + struct.pack('<IQ', 8, 1) + text('x')))
    entries.append(entry('none', 9, struct.pack('<IQ', 8, 0)))
    header = header_of(tmp_path / 'x.gguf', build(entries))
    for kind, _, value in SCALARS:
        assert header.get(f'one.{kind}') == value and header.get(f'many.{kind}') == [value] * 3
    assert header.get('text') == 'héllo ✓' and header.get('texts') == ['a', '']
    assert header.get('nested') == [[1, 2], ['x']] and header.get('none') == []
    assert header.get('absent', 5) == 5
    assert list(header.keys()) == list(header.to_dict()) and header.tensors == []


def test_agrees_with_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / 'x.gguf'
    write_gguf(path, 'qwen2', bias=True, kind='Q8_0')
    reader, header = gguf.GGUFReader(path), GGUFHeader(ByteFile(path))
    assert [r.name for r in header.tensors] == [t.name for t in reader.tensors]
    for ours_one, theirs in zip(header.tensors, reader.tensors):
        assert ours_one.shape == tuple(int(size) for size in reversed(theirs.shape))
        assert (ours_one.offset, ours_one.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours_one.dtype_name == theirs.tensor_type.name
    wanted = {key: field.contents() for key, field in reader.fields.items() if not key.startswith('GGUF.')}
    assert header.to_dict() == wanted == read_gguf_metadata(path)


@given(strings=st.lists(st.text(max_size=20), max_size=50), alignment=st.sampled_from([8, 32, 64, 4096]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_strings_and_alignment(tmp_path: Path, strings: list[str], alignment: int) -> None:
    path = tmp_path / 'x.gguf'
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_custom_alignment(alignment)
    if strings:
        writer.add_array('tokens', strings)
    values = [np.arange(5, dtype=np.float32), np.ones((3, 2), np.float16)]
    for i, value in enumerate(values):
        writer.add_tensor(f't{i}', value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = ByteFile(path)
    header = GGUFHeader(file)
    assert header.get('tokens', []) == strings
    for tensor, value in zip(header.tensors, values):
        assert file.read(tensor.offset, tensor.nbytes) == value.tobytes() and tensor.shape == value.shape
    file.close()


def test_metadata_larger_than_the_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, 'READ_AHEAD', 16)
    words = ['w' * (i % 40) for i in range(500)]
    array = struct.pack('<IQ', 8, len(words)) + b''.join(map(text, words))
    header = header_of(tmp_path / 'x.gguf', build([entry('a', 9, array), entry('b', 4, bytes(4))]))
    assert header.get('a') == words and header.get('b') == 0


U8, F32 = struct.pack('<B', 1), 0
ONE = [record('t', [8], F32, 0)]
DATA = bytes(32)
BAD: dict[str, tuple[bytes, str, str]] = {
    'nothing': (b'', 'LMD-123', ''),
    'three bytes': (b'GGU', 'LMD-123', ''),
    'a zip': (b'PK\3\4' + bytes(60), 'LMD-129', 'PK'),
    'version 1': (build(version=1), 'LMD-129', 'version 1'),
    'version 4': (build(version=4), 'LMD-129', 'version 4'),
    'big-endian': (b'GGUF' + struct.pack('>IQQ', 3, 0, 0), 'LMD-129', 'big-endian'),
    'preamble cut': (b'GGUF' + struct.pack('<IQ', 3, 0), 'LMD-123', ''),
    'too many keys': (build(keys=1 << 60), 'LMD-130', 'metadata entries'),
    'too many tensors': (build(tensors=1 << 63), 'LMD-130', 'tensors'),
    'more keys than there are': (build([entry('a', 0, U8)], keys=2), 'LMD-130', ''),
    'key without a name': (build([entry('', 0, U8)]), 'LMD-130', '0 bytes'),
    'key too long': (build([entry('k' * 2000, 0, U8)]), 'LMD-130', '2000 bytes'),
    'key not UTF-8': (build([entry(b'\xff', 0, U8)]), 'LMD-130', 'UTF-8'),
    'key not printable': (build([entry('a\n', 0, U8)]), 'LMD-130', 'printable'),
    'key twice': (build([entry('a', 0, U8)] * 2), 'LMD-130', 'twice'),
    'text not UTF-8': (build([entry('a', 8, text(b'\xff'))]), 'LMD-130', 'UTF-8'),
    'text longer than the file': (build([entry('a', 8, struct.pack('<Q', 1 << 50))]), 'LMD-130', ''),
    'text of 2**64-1 bytes': (build([entry('a', 8, b'\xff' * 8)]), 'LMD-130', ''),
    'unknown value type': (build([entry('a', 13, U8)]), 'LMD-130', 'type 13'),
    'unknown item type': (build([entry('a', 9, struct.pack('<IQ', 99, 1))]), 'LMD-130', 'type 99'),
    'array longer than the file': (build([entry('a', 9, struct.pack('<IQ', 10, 1 << 61))]), 'LMD-130', ''),
    'strings more than the file': (build([entry('a', 9, struct.pack('<IQ', 8, 1 << 61))]), 'LMD-130', ''),
    'string in array too long': (build([entry('a', 9, struct.pack('<IQQ', 8, 1, 1 << 62))]), 'LMD-123', ''),
    'arrays of arrays of ...': (build([entry('a', 9, struct.pack('<IQ', 9, 1) * 1000)]), 'LMD-130', 'nests'),
    'alignment 0': (build([entry('general.alignment', 4, struct.pack('<I', 0))]), 'LMD-130', 'alignment'),
    'alignment 48': (build([entry('general.alignment', 4, struct.pack('<I', 48))]), 'LMD-130', 'alignment'),
    'alignment as text': (build([entry('general.alignment', 8, text('32'))]), 'LMD-130', 'alignment'),
    'no dimensions': (build([], [record('t', [], F32, 0)], DATA), 'LMD-130', '0 dimensions'),
    'five dimensions': (build([], [record('t', [1] * 5, F32, 0)], DATA), 'LMD-130', '5 dimensions'),
    '2**31 dimensions': (build([], [text('t') + struct.pack('<I', 1 << 31) + bytes(40)]), 'LMD-130', 'dimensions'),
    'size 0': (build([], [record('t', [0], F32, 0)], DATA), 'LMD-130', '[0]'),
    'sizes overflow': (build([], [record('t', [1 << 40] * 4, F32, 0)], DATA), 'LMD-123', ''),
    'size 2**64-1': (build([], [record('t', [(1 << 64) - 1], F32, 0)], DATA), 'LMD-130', ''),
    'half a block': (build([], [record('t', [40], 8, 0)], DATA * 4), 'LMD-130', 'Q8_0'),
    'unknown tensor type': (build([], [record('t', [8], 77, 0)], DATA), 'LMD-131', '77'),
    'removed tensor type': (build([], [record('t', [8], 4, 0)], DATA), 'LMD-131', 'number 4'),
    'data beyond the file': (build([], [record('t', [9], F32, 0)], DATA), 'LMD-123', ''),
    'offset beyond the file': (build([], [record('t', [8], F32, 1 << 62)], DATA), 'LMD-123', ''),
    'offset not aligned': (build([], [record('t', [1], F32, 4)], DATA), 'LMD-130', 'aligned'),
    'overlap': (build([], [record('a', [8], F32, 0), record('b', [8], F32, 0)], DATA), 'LMD-130', 'overlap'),
    'tensor twice': (build([], [record('t', [8], F32, 0), record('t', [8], F32, 32)], DATA * 2), 'LMD-135', ''),
    'tensor name of dots': (build([], [record('.' * 3000, [8], F32, 0)], DATA), 'LMD-130', '3000'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_file(tmp_path: Path, case: str) -> None:
    content, code, told = BAD[case]
    error = failure(tmp_path / 'bad.gguf', content)
    assert error.code == code and told in str(error)


def test_counts_drive_no_allocation(tmp_path: Path) -> None:
    """A 64 MiB file that claims the largest arrays it may is refused, or read, in a fraction of its size."""
    path = tmp_path / 'big.gguf'
    for kind, count in ((8, (64 << 20) // 8), (9, (64 << 20) // 12), (0, 60 << 20)):
        with open(path, 'wb') as file:
            file.write(build([], [], keys=1)[:24] + entry('a', 9, struct.pack('<IQ', kind, count)))
            file.write(b'\xff' * 4096)
            file.truncate(64 << 20)
        tracemalloc.start()
        try:
            GGUFHeader(ByteFile(path))
        except LoadError as error:
            assert error.code in ('LMD-123', 'LMD-130')
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 << 20, (kind, peak)


def test_a_header_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'big.gguf'
    with open(path, 'wb') as file:
        file.write(build([], [], keys=1)[:24] + entry('a', 9, struct.pack('<IQ', 0, 1 << 40)))
        file.truncate(1 << 42)  # sparse
    with pytest.raises(LoadError) as caught:
        GGUFHeader(ByteFile(path))
    assert caught.value.code == 'LMD-130' and 'header is larger' in str(caught.value)


@pytest.fixture(scope='module')
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A whole tiny model, and where its tensor data begins."""
    path = tmp_path_factory.mktemp('gguf') / 'x.gguf'
    write_gguf(path, 'llama', kind='Q4_0', extra={'nested.ok': [1, 2, 3]})
    return path.read_bytes(), min(tensor.offset for tensor in GGUFHeader(ByteFile(path)).tensors)


def test_truncated_anywhere(tmp_path: Path, valid: tuple[bytes, int]) -> None:
    content, header = valid
    cuts = [*range(0, header, 23), *random.Random(0).sample(range(header, len(content)), 50), len(content) - 1]
    for cut in cuts:
        assert failure(tmp_path / 'cut.gguf', content[:cut]).code in ('LMD-123', 'LMD-130')


def open_and_read(path: Path, content: bytes) -> None:
    """Open and read everything; only our own errors may escape."""
    path.write_bytes(content)
    try:
        read_gguf_metadata(path)
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.names():
                assert checkpoint.get(name).nbytes <= 8 * len(content)
    except LmdeployError as error:
        assert len(error.text('en')) < 2000 and error.text('zh')


@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_header_never_escapes(tmp_path: Path, valid: tuple[bytes, int], data: st.DataObject) -> None:
    open_and_read(tmp_path / 'bad.gguf', data.draw(mutations(*valid)))


scalars = st.sampled_from(SCALARS).flatmap(
    lambda one: st.binary(min_size=struct.calcsize('<' + one[1]), max_size=struct.calcsize('<' + one[1])).map(
        lambda raw: (one[0], raw)
    )
)
values = scalars | st.text(max_size=8).map(lambda s: (8, text(s))) | st.just((9, struct.pack('<IQII', 4, 2, 7, 7)))


@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_metadata_never_escapes(tmp_path: Path, valid: tuple[bytes, int], data: st.DataObject) -> None:
    """Well-formed files whose metadata have any type and value where numbers are expected."""
    path = tmp_path / 'odd.gguf'
    path.write_bytes(valid[0])
    keys = [key for key in GGUFHeader(ByteFile(path)).keys() if key.startswith('llama.')]
    extra = ['rope.scaling.type', 'rope.scaling.factor', 'rope.scaling.attn_factor', 'rope.scaling.yarn_beta_fast']
    metadata = {'general.architecture': (8, text('llama'))}
    for key in [*keys, *(f'llama.{name}' for name in extra), 'tokenizer.ggml.eos_token_id', 'split.count']:
        metadata[key] = data.draw(values) if data.draw(st.booleans()) else (4, struct.pack('<I', 4))
    if data.draw(st.booleans()):
        metadata['llama.rope.scaling.type'] = (8, text(data.draw(st.sampled_from(['yarn', 'linear', 'none', '']))))
    entries = [entry(key, *value) for key, value in metadata.items()]
    records = [record('token_embd.weight', [8, 1], F32, 0)]
    if data.draw(st.booleans()):
        records.append(record('rope_freqs.weight', [2], F32, 32))
    floats = data.draw(st.binary(min_size=8, max_size=8))
    open_and_read(path, build(entries, records, DATA + floats + bytes(24)))


def test_metadata_without_torch(tmp_path: Path) -> None:
    path = tmp_path / 'x.gguf'
    write_gguf(path)
    code = (
        'import sys; from lmdeploy.weights.gguf import read_gguf_metadata; '
        'print(len(read_gguf_metadata(sys.argv[1])["tokenizer.ggml.tokens"]), "torch" in sys.modules)'
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, '-c', code, path], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['50', 'False']
