"""What is in a Hugging Face model folder: its JSON files and its weight files, checked before use.

Only JSON and safetensors are ever opened. Python files, pickles and anything else in the folder are left alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lmdeploy.errors import LoadError
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.safetensors import TensorEntry, read_header

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
PICKLES = ('.bin', '.pth', '.pt', '.ckpt')
MAX_JSON = 64 << 20
MAX_LISTED = 20


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """A JSON object from the folder; ``{}`` if an optional file is absent.

    Raises:
        LoadError: LMD-122 missing, too large, not JSON or not an object; LMD-128 a link that leaves the folder.
    """
    if not path.exists():
        if required:
            raise LoadError('LMD-122', file=path, reason='it is missing')
        return {}
    check_inside(path)
    file = ByteFile(path)
    try:
        if file.size > MAX_JSON:
            raise LoadError('LMD-122', file=path, reason=f'it has {file.size} bytes (limit {MAX_JSON})')
        value = json.loads(file.read(0, file.size).decode('utf-8-sig'))
    except RecursionError:
        raise LoadError('LMD-122', file=path, reason='it nests too deeply') from None
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise LoadError('LMD-122', file=path, reason=f'it is not JSON ({error})') from None
    finally:
        file.close()
    if not isinstance(value, dict):
        raise LoadError('LMD-122', file=path, reason='it is not a JSON object')
    return value


def check_inside(path: Path) -> None:
    """Refuse a link out of the folder. (Links within one entry are how the Hugging Face cache stores files.)

    Raises:
        LoadError: LMD-128.
    """
    folder = path.parent.resolve()
    root = folder
    if folder.parent.name == 'snapshots' and (folder.parents[1] / 'blobs').is_dir():
        root = folder.parents[1]
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise LoadError('LMD-128', file=path, reason='it is a link to nowhere') from None
    if not target.is_relative_to(root):
        raise LoadError('LMD-128', file=path, reason=f'it is a link to {target}, outside the model folder')


def open_weight_files(folder: Path) -> list[tuple[ByteFile, dict[str, TensorEntry]]]:
    """The folder's safetensors files with their checked headers.

    Raises:
        LoadError: LMD-120, 121 nothing to open; LMD-123 to 128, 135, 136 for what is wrong with the files.
    """
    if (folder / INDEX).exists():
        return _open_sharded(folder)
    if not (folder / SINGLE).exists():
        raise _no_weights(folder)
    check_inside(folder / SINGLE)
    return [_open_one(folder / SINGLE)]


def _open_one(path: Path) -> tuple[ByteFile, dict[str, TensorEntry]]:
    file = ByteFile(path)
    try:
        return file, read_header(file)
    except LoadError:
        file.close()
        raise


def _no_weights(folder: Path) -> LoadError:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return LoadError('LMD-139', file=folder, reason=error.strerror or str(error))
    shards = [name for name in names if name.endswith('.safetensors')]
    if shards:
        return LoadError('LMD-120', path=folder, reason=f'{shards[0]} is there, but neither {SINGLE} nor {INDEX}')
    ggufs = [name for name in names if name.endswith('.gguf')]
    if ggufs:
        return LoadError('LMD-120', path=folder, reason=f'give the path of the GGUF file itself, {folder / ggufs[0]}')
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return LoadError('LMD-121', path=folder, files=', '.join(pickles[:MAX_LISTED]))
    return LoadError('LMD-120', path=folder, reason=f'there is no {SINGLE} and no {INDEX}')


def _open_sharded(folder: Path) -> list[tuple[ByteFile, dict[str, TensorEntry]]]:
    index = folder / INDEX
    weight_map, total_size = _read_index(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.exists(folder / shard)]
    if missing:
        listed = ', '.join(missing[:MAX_LISTED])
        raise LoadError('LMD-127', index=index, count=len(missing), total=len(shards), files=listed)
    opened: list[tuple[ByteFile, dict[str, TensorEntry]]] = []
    try:
        for shard in shards:
            check_inside(folder / shard)
            opened.append(_open_one(folder / shard))
        _check_index(index, weight_map, total_size, dict(zip(shards, (entries for _, entries in opened))))
    except LoadError:
        for file, _ in opened:
            file.close()
        raise
    return opened


def _read_index(path: Path) -> tuple[dict[str, str], float | None]:
    content = read_json(path)
    weight_map, metadata = content.get('weight_map'), content.get('metadata') or {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError('LMD-126', file=path, reason='it has no weight_map')
    if not isinstance(metadata, dict):
        raise LoadError('LMD-126', file=path, reason='its metadata is not an object')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise LoadError('LMD-126', file=path, reason=f'the file of {name[:200]!r} is not a name')
        if '/' in shard or '\\' in shard or not shard.isprintable() or len(shard.encode()) > 255:
            raise LoadError('LMD-128', file=repr(shard[:200]), reason=f'{INDEX} must name plain files without folders')
        if not shard.endswith('.safetensors'):
            raise LoadError('LMD-128', file=shard, reason=f'{INDEX} names it, and it is not a safetensors file')
    total_size = metadata.get('total_size')
    if total_size is not None and (isinstance(total_size, bool) or not isinstance(total_size, (int, float))):
        raise LoadError('LMD-126', file=path, reason=f'total_size is {total_size!r:.80}')
    return weight_map, total_size


def _check_index(
    index: Path, weight_map: dict[str, str], total_size: float | None, shards: dict[str, dict[str, TensorEntry]]
) -> None:
    """Every tensor lies in the one shard that the index says, and all sizes add up."""

    def disagree(reason: str) -> LoadError:
        return LoadError('LMD-136', index=index, reason=reason)

    absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if absent:
        listed = ', '.join(f'{name[:200]} (in {weight_map[name]})' for name in absent[:MAX_LISTED])
        raise disagree(f'{len(absent)} tensors are not in the files it says: {listed}')
    for shard, entries in shards.items():
        for name in entries:
            if weight_map.get(name) != shard:
                raise disagree(f'{shard} holds {name}, which the index puts in {weight_map.get(name, "no file")}')
    found = sum(entry.nbytes for entries in shards.values() for entry in entries.values())
    if total_size is not None and total_size != found:
        raise disagree(f'the index says {total_size} bytes of tensors, the shards hold {found}')
