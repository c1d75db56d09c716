"""GGUF headers: metadata and the table of tensors, without torch.

A GGUF file is: magic, version, counts; key-value pairs; tensor records; padding; tensor data. Every number in it is
checked against the bytes that are left before it is used, so that a hostile file costs neither memory nor time.
Arrays of strings (the vocabulary) make up nearly all of the header: they are walked once and decoded when asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lmdeploy.errors import LoadError
from lmdeploy.weights.bytefile import ByteFile

MAGIC = b'GGUF'
MAX_HEADER = 128 << 20  # bytes; the largest vocabularies need 20 MiB
MAX_NAME = 1024
MAX_DIMS = 4
MAX_DEPTH = 4  # of arrays in arrays
READ_AHEAD = 4 << 20

# ggml type id -> (name, elements per block, bytes per block)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ('F32', 1, 4), 1: ('F16', 1, 2), 2: ('Q4_0', 32, 18), 3: ('Q4_1', 32, 20), 6: ('Q5_0', 32, 22),
    7: ('Q5_1', 32, 24), 8: ('Q8_0', 32, 34), 9: ('Q8_1', 32, 40), 10: ('Q2_K', 256, 84), 11: ('Q3_K', 256, 110),
    12: ('Q4_K', 256, 144), 13: ('Q5_K', 256, 176), 14: ('Q6_K', 256, 210), 15: ('Q8_K', 256, 292),
    16: ('IQ2_XXS', 256, 66), 17: ('IQ2_XS', 256, 74), 18: ('IQ3_XXS', 256, 98), 19: ('IQ1_S', 256, 50),
    20: ('IQ4_NL', 32, 18), 21: ('IQ3_S', 256, 110), 22: ('IQ2_S', 256, 82), 23: ('IQ4_XS', 256, 136),
    24: ('I8', 1, 1), 25: ('I16', 1, 2), 26: ('I32', 1, 4), 27: ('I64', 1, 8), 28: ('F64', 1, 8),
    29: ('IQ1_M', 256, 56), 30: ('BF16', 1, 2), 34: ('TQ1_0', 256, 54), 35: ('TQ2_0', 256, 66),
    39: ('MXFP4', 32, 17), 40: ('NVFP4', 64, 36), 41: ('Q1_0', 128, 18),
}  # fmt: skip

# metadata value type id -> struct format
SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor. ``shape`` is row-major (``[out, in]``), ``offset`` counts from the start of the file."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Lazy:
    """An array that was walked but not decoded: ``count`` items from ``start`` on."""

    start: int
    count: int
    kind: int


class GGUFHeader:
    """The parsed header of one file: ``keys()``, ``get(key)``, ``to_dict()`` for metadata, and ``tensors``.

    Raises:
        LoadError: LMD-123 truncated, LMD-129 not a GGUF file or a version or byte order that is not supported,
            LMD-130 corrupt.
    """

    def __init__(self, file: ByteFile) -> None:
        self._cursor = _Cursor(file)
        self._values: dict[str, Any] = {}
        version, tensor_count, key_count = self._read_preamble()
        self.version = version
        self._read_metadata(key_count)
        self.tensors = self._read_tensors(tensor_count)

    def keys(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """A value; arrays are decoded to lists on every call, so keep what you need."""
        value = self._values.get(key, default)
        return self._cursor.decode(value) if isinstance(value, _Lazy) else value

    def to_dict(self) -> dict[str, Any]:
        """All metadata, decoded."""
        return {key: self.get(key) for key in self._values}

    def _read_preamble(self) -> tuple[int, int, int]:
        cursor = self._cursor
        if cursor.size == 0:
            raise LoadError('LMD-123', file=cursor.path, size=0, needed=24)
        magic = cursor.take(4)
        if magic != MAGIC:
            raise LoadError('LMD-129', file=cursor.path, reason=f'it starts with {magic!r}, not with {MAGIC!r}')
        version = cursor.unpack('I')
        if version in (1 << 24, 2 << 24, 3 << 24):
            raise LoadError('LMD-129', file=cursor.path, reason='it is written for big-endian machines')
        if version not in (2, 3):
            raise LoadError('LMD-129', file=cursor.path, reason=f'it has GGUF version {version}, not 2 or 3')
        return version, cursor.unpack('Q'), cursor.unpack('Q')

    def _read_metadata(self, count: int) -> None:
        cursor = self._cursor
        cursor.check_count(count, 13, 'metadata entries')  # an entry: length, name, type, one byte
        for _ in range(count):
            key = cursor.name('metadata key')
            if key in self._values:
                raise cursor.corrupt(f'metadata key {key!r} appears twice')
            self._values[key] = cursor.value(cursor.unpack('I'), key)

    def _read_tensors(self, count: int) -> list[TensorRecord]:
        cursor = self._cursor
        cursor.check_count(count, 24, 'tensors')  # a record: name length, dimensions, type, offset
        alignment = self._values.get('general.alignment', 32)
        if type(alignment) is not int or alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise cursor.corrupt(f'general.alignment is {alignment!r}, not a power of two of at least 8')
        records = [self._read_record() for _ in range(count)]
        base = -(-cursor.pos // alignment) * alignment
        names: set[str] = set()
        for record in records:
            if record.name in names:
                raise LoadError('LMD-135', tensor=record.name, file=cursor.path)
            names.add(record.name)
            if record.offset % alignment:
                raise cursor.corrupt(f'tensor {record.name!r} is not aligned to {alignment} bytes')
        placed = [
            TensorRecord(record.name, record.dtype_name, record.shape, base + record.offset, record.nbytes)
            for record in records
        ]
        self._check_ranges(placed)
        return placed

    def _read_record(self) -> TensorRecord:
        cursor = self._cursor
        name = cursor.name('tensor name')
        ndim = cursor.unpack('I')
        if not 1 <= ndim <= MAX_DIMS:
            raise cursor.corrupt(f'tensor {name!r} has {ndim} dimensions')
        dims = [cursor.unpack('Q') for _ in range(ndim)]
        type_id, offset = cursor.unpack('I'), cursor.unpack('Q')
        if type_id not in TYPES:
            found = f'number {type_id}'
            raise LoadError('LMD-131', tensor=name, file=cursor.path, found=found, known=supported_types())
        dtype_name, block, nbytes = TYPES[type_id]
        if min(dims) < 1 or max(dims) >= 1 << 48 or dims[0] % block:
            raise cursor.corrupt(f'tensor {name!r} of type {dtype_name} has dimensions {dims}')
        return TensorRecord(name, dtype_name, tuple(reversed(dims)), offset, prod(dims) // block * nbytes)

    def _check_ranges(self, records: list[TensorRecord]) -> None:
        """Ranges lie inside the file and do not overlap. (Padding between them is the alignment's.)"""
        cursor, end, last = self._cursor, 0, ''
        for record in sorted(records, key=lambda r: r.offset):
            if record.offset < end:
                raise cursor.corrupt(f'tensors {last!r} and {record.name!r} overlap')
            end, last = record.offset + record.nbytes, record.name
            if end > cursor.size:
                raise LoadError('LMD-123', file=cursor.path, size=cursor.size, needed=end)


class _Cursor:
    """Reads a header front to back out of a buffer that grows as needed, never past the end of the file."""

    def __init__(self, file: ByteFile) -> None:
        self.path, self.size, self.pos = file.path, file.size, 0
        self._file = file
        self._buffer = bytearray()

    def corrupt(self, reason: str) -> LoadError:
        return LoadError('LMD-130', file=self.path, offset=self.pos, reason=reason)

    def check_count(self, count: int, least: int, what: str) -> None:
        """``count`` items of at least ``least`` bytes each must fit into the rest of the file."""
        if count * least > self.size - self.pos:
            raise self.corrupt(f'{count} {what} cannot fit into the remaining {self.size - self.pos} bytes')

    def need(self, end: int) -> None:
        """Make the buffer reach to ``end``."""
        if end <= len(self._buffer):
            return
        if end > self.size:
            raise LoadError('LMD-123', file=self.path, size=self.size, needed=end)
        if end > MAX_HEADER:
            raise self.corrupt(f'the header is larger than {MAX_HEADER} bytes')
        have = len(self._buffer)
        self._buffer += self._file.read(have, min(max(end - have, READ_AHEAD), self.size - have))

    def take(self, count: int) -> bytes:
        self.need(self.pos + count)
        self.pos += count
        return bytes(self._buffer[self.pos - count : self.pos])

    def unpack(self, code: str) -> Any:
        return struct.unpack('<' + code, self.take(struct.calcsize('<' + code)))[0]

    def string(self) -> bytes:
        count = self.unpack('Q')
        self.check_count(count, 1, 'bytes of a string')
        return self.take(count)

    def name(self, what: str) -> str:
        raw = self.string()
        if not 1 <= len(raw) <= MAX_NAME:
            raise self.corrupt(f'a {what} has {len(raw)} bytes')
        name = self._text(raw, what)
        if not name.isprintable():
            raise self.corrupt(f'the {what} {name[:200]!r} is not printable')
        return name

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._text(self.string(), f'the value of {key!r}')
        if kind == ARRAY:
            start = self.pos
            self._skip_array(key, 1)
            item, count = struct.unpack_from('<IQ', self._buffer, start)
            return _Lazy(start + 12, count, item)
        if kind not in SCALARS:
            raise self.corrupt(f'the value of {key!r} has the unknown type {kind}')
        return self.unpack(SCALARS[kind])

    def decode(self, array: _Lazy) -> list:
        """The items of an array that :meth:`value` walked."""
        buffer, pos, kind, count = self._buffer, array.start, array.kind, array.count
        if kind in SCALARS:
            return list(struct.unpack_from(f'<{count}{SCALARS[kind]}', buffer, pos))
        if kind == STRING:
            return self._decode_strings(pos, count)
        saved, self.pos = self.pos, pos  # arrays of arrays are small and rare: walk them again
        try:
            return [self.decode(self.value(ARRAY, '')) for _ in range(count)]
        finally:
            self.pos = saved

    def _decode_strings(self, pos: int, count: int) -> list[str]:
        buffer, length = self._buffer, struct.Struct('<Q').unpack_from
        items: list[str] = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + length(buffer, pos)[0]
                items.append(buffer[start:pos].decode())
        except UnicodeDecodeError as error:
            raise LoadError('LMD-130', file=self.path, offset=start, reason=f'a string is not UTF-8: {error}') from None
        return items

    def _skip_array(self, key: str, depth: int) -> None:
        kind, count = self.unpack('I'), self.unpack('Q')
        if depth > MAX_DEPTH:
            raise self.corrupt(f'the value of {key!r} nests arrays more than {MAX_DEPTH} deep')
        if kind == ARRAY:
            self.check_count(count, 12, f'arrays in {key!r}')
            for _ in range(count):
                self._skip_array(key, depth + 1)
        elif kind == STRING:
            self.check_count(count, 8, f'strings in {key!r}')
            self._skip_strings(count)
        elif kind in SCALARS:
            width = struct.calcsize('<' + SCALARS[kind])
            self.check_count(count, width, f'items in {key!r}')
            self.need(self.pos + count * width)
            self.pos += count * width
        else:
            raise self.corrupt(f'the array {key!r} has the unknown item type {kind}')

    def _skip_strings(self, count: int) -> None:
        length, pos, buffer, size = struct.Struct('<Q').unpack_from, self.pos, self._buffer, len(self._buffer)
        for _ in range(count):
            if pos + 8 > size:
                self.need(pos + 8)
                size = len(buffer)
            pos += 8 + length(buffer, pos)[0]
            if pos > size:
                self.need(pos)
                size = len(buffer)
        self.pos = pos

    def _text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.corrupt(f'{what} is not UTF-8') from None


def supported_types() -> str:
    """The block types that can be dequantised, for error texts."""
    return 'F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K'


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """All metadata of a GGUF file as plain Python values; imports no torch.

    Raises:
        LoadError: see :class:`GGUFHeader`.
    """
    file = ByteFile(Path(path))
    try:
        return GGUFHeader(file).to_dict()
    finally:
        file.close()
