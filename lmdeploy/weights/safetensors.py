"""safetensors headers, checked completely before a byte of tensor data is read.

A file is: header length (8 bytes), header (JSON: name -> dtype, shape, data_offsets), tensor data. The check is our
own, because a header is the attack surface of a weight file: nothing in it is believed until it fits the file's size.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any, NamedTuple

from lmdeploy.errors import LoadError
from lmdeploy.weights.bytefile import ByteFile

MAX_HEADER = 100_000_000  # bytes
MAX_NAME = 1024
MAX_DIMS = 8
MAX_STRAY = 1 << 20  # brackets or commas beyond what tensor entries use; bounds what parsing can allocate

ITEM_SIZES: dict[str, int] = {
    'BOOL': 1, 'U8': 1, 'I8': 1, 'F8_E5M2': 1, 'F8_E4M3': 1, 'F8_E8M0': 1, 'I16': 2, 'U16': 2, 'F16': 2, 'BF16': 2,
    'I32': 4, 'U32': 4, 'F32': 4, 'I64': 8, 'U64': 8, 'F64': 8, 'C64': 8,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """One tensor; ``offset`` counts from the start of the file."""

    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: ByteFile) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name.

    Raises:
        LoadError: LMD-123 truncated, LMD-124 corrupt header, LMD-125 corrupt entry, LMD-135 duplicate name.
    """
    if file.size < 8:
        raise LoadError('LMD-123', file=file.path, size=file.size, needed=8)
    length = int.from_bytes(file.read(0, 8), 'little')
    if length > MAX_HEADER:
        raise LoadError('LMD-124', file=file.path, reason=f'its header claims {length} bytes (limit {MAX_HEADER})')
    base = 8 + length
    if base > file.size:
        raise LoadError('LMD-123', file=file.path, size=file.size, needed=base)
    header = _parse(file.read(8, length), file)
    metadata = header.pop('__metadata__', {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoadError('LMD-124', file=file.path, reason='its __metadata__ is not an object of strings')
    entries = {name: _entry(name, value, base, file) for name, value in header.items()}
    _check_cover(entries, base, file)
    return entries


def _parse(text: bytes, file: ByteFile) -> dict[str, Any]:
    def corrupt(reason: str) -> LoadError:
        return LoadError('LMD-124', file=file.path, reason=reason)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                if isinstance(value, dict):
                    raise LoadError('LMD-135', tensor=name[:200], file=file.path)
                raise corrupt(f'{name[:200]!r} appears twice in one object')
            result[name] = value
        return result

    def refuse(number: str) -> None:
        raise corrupt(f'it contains the number {number[:40]}, which is not an integer')

    if not text.startswith(b'{'):
        raise corrupt('its header is not a JSON object')
    usual = text.count(b'"data_offsets"')
    if text.count(b'[') + text.count(b'{') > 3 * usual + MAX_STRAY or text.count(b',') > 16 * usual + MAX_STRAY:
        raise corrupt('its header has far more brackets or commas than tensors need')
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_float=refuse, parse_constant=refuse)
    except UnicodeDecodeError:
        raise corrupt('its header is not UTF-8') from None
    except RecursionError:
        raise corrupt('its header nests too deeply') from None
    except ValueError as error:
        raise corrupt(f'its header is not JSON: {error}') from None
    return header


def _entry(name: str, value: Any, base: int, file: ByteFile) -> TensorEntry:
    def bad(reason: str) -> LoadError:
        return LoadError('LMD-125', tensor=name[:200], file=file.path, reason=reason)

    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise bad(f'its name is not one of 1 to {MAX_NAME} printable characters')
    if not isinstance(value, dict) or value.keys() != {'dtype', 'shape', 'data_offsets'}:
        raise bad('it needs exactly dtype, shape and data_offsets')
    dtype, shape, offsets = value['dtype'], value['shape'], value['data_offsets']
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise bad(f'dtype {dtype!r:.40} is unknown')
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise bad(f'shape {shape!r:.80} is not a list of at most {MAX_DIMS} sizes')
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise bad(f'data_offsets {offsets!r:.80} are not two positions')
    begin, end = offsets
    if end - begin != prod(shape) * ITEM_SIZES[dtype]:
        raise bad(f'{dtype} of shape {shape} does not take the {end - begin} bytes it claims')
    if base + end > file.size:
        raise LoadError('LMD-123', file=file.path, size=file.size, needed=base + end)
    return TensorEntry(dtype, tuple(shape), base + begin, end - begin)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_cover(entries: dict[str, TensorEntry], base: int, file: ByteFile) -> None:
    """Tensors cover the data exactly: no gap, no overlap, no byte left at the end."""
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            what = 'overlaps another tensor' if entry.offset < position else 'leaves a gap before it'
            raise LoadError('LMD-125', tensor=name, file=file.path, reason=f'its range {what}')
        position += entry.nbytes
    if position != file.size:
        raise LoadError('LMD-124', file=file.path, reason=f'{file.size - position} bytes belong to no tensor')
