"""Checkpoint: a model's tensors by their Hugging Face names, pulled by the modules that need them.

Life: :func:`open_checkpoint` checks every header and reads no tensor; modules pull theirs through :class:`Prefix`
cursors; :meth:`Checkpoint.finish` names what nobody asked for; :meth:`Checkpoint.close` closes the files. Tensors own
their memory and outlive the checkpoint. Pulling is safe from several threads, unless they are uploaded to a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmdeploy.config.vision import beside
from lmdeploy.errors import LoadError
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.dequant import BLOCK_SIZES, BLOCK_TYPES, CHUNK_ELEMENTS, dequantize_into
from lmdeploy.weights.folder import open_weight_files, read_json
from lmdeploy.weights.gguf import GGUFHeader, TensorRecord, supported_types
from lmdeploy.weights.gguf_config import ROPE_FACTORS, GGUFConfig
from lmdeploy.weights.gguf_names import GGUFArchitecture, hf_name
from lmdeploy.weights.upload import Uploader

MAX_LISTED = 20
MAX_THREADS = 8  # of one dequantisation; more would wait for the interpreter

DTYPES: dict[str, torch.dtype] = {
    'BOOL': torch.bool, 'U8': torch.uint8, 'I8': torch.int8, 'U16': torch.uint16, 'I16': torch.int16,
    'U32': torch.uint32, 'I32': torch.int32, 'U64': torch.uint64, 'I64': torch.int64, 'F16': torch.float16,
    'BF16': torch.bfloat16, 'F32': torch.float32, 'F64': torch.float64, 'C64': torch.complex64,
    'F8_E5M2': torch.float8_e5m2, 'F8_E4M3': torch.float8_e4m3fn, 'F8_E8M0': torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies and how its stored form differs from the Hugging Face one.

    Attributes:
        heads: q or k rows are stored for interleaved rotation with so many heads; 0: rows are in order.
        shift: what was added to the values when they were stored.
    """

    file: ByteFile
    name: str  # in the file
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    heads: int = 0
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as stored, with rows and values in the Hugging Face convention.

    Attributes:
        shape: logical shape, in elements.
        dtype_name: ``'F32'``, ``'BF16'``, ``'F8_E4M3'``, ``'Q4_K'``, ...
        data: of ``shape`` and the named type; for a block type ``[*shape[:-1], row_bytes] uint8``.
    """

    name: str
    shape: tuple[int, ...]
    dtype_name: str
    data: Tensor


class Checkpoint:
    """The tensors and configuration of one model.

    Attributes:
        config: the content of config.json; for a GGUF file, made from its metadata.
        generation_config: the content of generation_config.json, or ``{}``.
        path: the folder or file, for messages.
        dummy: the tensors are made up, and dense whatever the configuration says.
    """

    dummy = False

    def __init__(
        self,
        path: Path,
        tensors: dict[str, StoredTensor],
        config: dict[str, Any],
        generation_config: dict[str, Any],
        files: Iterable[ByteFile] = (),
    ) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self._tensors = tensors
        self._files = tuple(files)
        self._children = _index_children(tensors)
        self._used: set[str] = set()
        self._uploader: Uploader | None = None

    def upload_to(self, device: torch.device) -> None:
        """From now on, tensors that need no dequantisation are read straight into the memory of ``device``."""
        self._uploader = Uploader(device)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def prefix(self, name: str = '') -> Prefix:
        """A cursor at ``name`` (``''``: the top)."""
        return Prefix(self, name)

    def leftover(self) -> list[str]:
        """The names that were never pulled, sorted."""
        return sorted(self._tensors.keys() - self._used)

    def finish(self, ignore: tuple[str, ...] = ()) -> None:
        """Check that every tensor was pulled, apart from names that match a pattern of ``ignore`` (``re.search``).

        Raises:
            LoadError: LMD-134, naming up to 20 leftovers.
        """
        left = [name for name in self.leftover() if not any(re.search(pattern, name) for pattern in ignore)]
        if left:
            listed = ', '.join(left[:MAX_LISTED]) + (', ...' if len(left) > MAX_LISTED else '')
            raise LoadError('LMD-134', file=self.path, count=len(left), tensors=listed)

    def close(self) -> None:
        """Close the files; tensors that were pulled stay valid."""
        if self._uploader is not None:
            self._uploader.close()
            self._uploader = None
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stored(self, name: str) -> StoredTensor:
        """Where tensor ``name`` lies.

        Raises:
            LoadError: LMD-132, no such tensor.
        """
        found = self._tensors.get(name)
        if found is None:
            raise LoadError('LMD-132', tensor=name, file=self.path)
        return found

    def raw(self, name: str) -> RawTensor:
        """Read tensor ``name`` as stored and mark it as used."""
        stored = self.stored(name)
        self._used.add(name)
        return RawTensor(name, stored.shape, stored.dtype_name, _read_raw(stored))

    def get(self, name: str, shape: tuple[int | None, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Read tensor ``name`` as a dense one and mark it as used; see :meth:`Prefix.get`."""
        stored = self.stored(name)
        if shape is not None and not _shape_fits(stored.shape, shape):
            wanted = str(list(shape)).replace('None', 'any')
            raise LoadError('LMD-133', tensor=name, file=stored.file.path, found=list(stored.shape), wanted=wanted)
        self._used.add(name)
        if stored.dtype_name in BLOCK_TYPES:
            return _read_blocks(stored, dtype or torch.float32)
        if self._uploader is not None:
            data = self._uploader.read(stored.file, stored.offset, stored.nbytes)
            tensor = _restore(stored, data.view(DTYPES[stored.dtype_name]).view(stored.shape))
        else:
            tensor = _read_raw(stored)
        return tensor if dtype is None else tensor.to(dtype)


class Prefix:
    """A cursor into the tree of tensor names: ``checkpoint.prefix('model').child('norm').get('weight')``."""

    __slots__ = ('checkpoint', 'path')

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        self.checkpoint = checkpoint
        self.path = path

    def __repr__(self) -> str:
        return f'Prefix({self.path!r})'

    def child(self, name: str) -> Prefix:
        """The cursor at ``name`` below this one; names with dots go several levels down."""
        return Prefix(self.checkpoint, self._join(name))

    def has(self, name: str) -> bool:
        """Whether a tensor or a sub-prefix ``name`` exists below."""
        full = self._join(name)
        return full in self.checkpoint._tensors or full in self.checkpoint._children

    def tensors(self) -> list[str]:
        """Names of the tensors directly below, sorted: ``['bias', 'weight']``."""
        return sorted(self.checkpoint._children.get(self.path, ()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor, without reading it."""
        return self.checkpoint.stored(self._join(name)).shape

    def dtype_name(self, name: str) -> str:
        """Stored type of a tensor (``'BF16'``, ``'Q4_K'``, ...), without reading it."""
        return self.checkpoint.stored(self._join(name)).dtype_name

    def raw(self, name: str) -> RawTensor:
        """The tensor as stored; marks it as used.

        Raises:
            LoadError: LMD-132 missing, LMD-123, LMD-139 unreadable.
        """
        return self.checkpoint.raw(self._join(name))

    def get(self, name: str, shape: tuple[int | None, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor as a dense one with memory of its own; marks it as used.

        Args:
            name: below this prefix.
            shape: what the model needs; None in it leaves that size open.
            dtype: to convert to. None: as stored, float32 for block-quantised tensors.

        Raises:
            LoadError: LMD-132 missing, LMD-133 another shape, LMD-131 a block type without dequantisation.
        """
        return self.checkpoint.get(self._join(name), shape, dtype)

    def _join(self, name: str) -> str:
        return f'{self.path}.{name}' if self.path else name


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder with safetensors weights, or a GGUF file, after checking all its headers.

    Raises:
        LoadError: LMD-120 to LMD-139, naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() in ('.bin', '.pth', '.pt', '.ckpt'):
        raise LoadError('LMD-121', path=path, files=path.name)
    if path.suffix == '.safetensors':
        raise LoadError('LMD-120', path=path, reason='it is a single weight file without its config.json')
    return _open_gguf(path)


def _open_folder(folder: Path) -> Checkpoint:
    config = read_json(folder / 'config.json')
    generation_config = read_json(folder / 'generation_config.json', required=False)
    opened = open_weight_files(folder)
    tensors = {
        name: StoredTensor(file, name, entry.dtype_name, entry.shape, entry.offset, entry.nbytes)
        for file, entries in opened
        for name, entry in entries.items()
    }
    return Checkpoint(folder, tensors, config, generation_config, [file for file, _ in opened])


def _open_gguf(path: Path) -> Checkpoint:
    file = ByteFile(path)
    try:
        header = GGUFHeader(file)
        reader = GGUFConfig(header, file)
        config = reader.config()
        tensors: dict[str, StoredTensor] = {}
        for record in header.tensors:
            if record.name == ROPE_FACTORS:
                continue  # already in config['rope_scaling']
            name = hf_name(record.name, reader.arch)
            if name in tensors:
                raise LoadError('LMD-135', tensor=name, file=path)
            tensors[name] = _gguf_tensor(record, name, reader.arch, config, file)
        folder = beside(path)
        if folder is not None:
            return _join(path, tensors, config, reader.generation_config(), file, folder)
        return Checkpoint(path, tensors, config, reader.generation_config(), [file])
    except LoadError:
        file.close()
        raise


def _join(path: Path, tensors: dict[str, StoredTensor], config: dict[str, Any], generation_config: dict[str, Any],
          file: ByteFile, folder: Path) -> Checkpoint:
    """A language model in a GGUF file and the vision part in a folder, as one checkpoint in InternVL's layout."""
    part = _open_folder(folder)
    named = {f'language_model.{name}': tensor for name, tensor in tensors.items()}
    return Checkpoint(path, named | part._tensors, {**part.config, 'llm_config': config}, generation_config,
                      [file, *part._files])


def _gguf_tensor(
    record: TensorRecord, name: str, arch: GGUFArchitecture, config: dict[str, Any], file: ByteFile
) -> StoredTensor:
    if record.dtype_name not in BLOCK_TYPES and record.dtype_name not in DTYPES:
        raise LoadError('LMD-131', tensor=record.name, file=file.path, found=record.dtype_name, known=supported_types())
    heads = 0
    if arch.permuted_qk and name.endswith(('.q_proj.weight', '.q_proj.bias', '.k_proj.weight', '.k_proj.bias')):
        heads = config['num_attention_heads' if '.q_proj.' in name else 'num_key_value_heads']
        if heads < 1 or record.shape[0] % (2 * heads):
            raise LoadError('LMD-138', file=file.path, key='attention.head_count', reason=f'does not fit {record.name}')
    shift = arch.norm_shift if record.name.endswith('norm.weight') else 0.0
    return StoredTensor(file, record.name, record.dtype_name, record.shape, record.offset, record.nbytes, heads, shift)


def _index_children(names: Iterable[str]) -> dict[str, set[str]]:
    """Every prefix, with the names of the tensors directly below it."""
    children: dict[str, set[str]] = {'': set()}
    for name in names:
        parent, _, leaf = name.rpartition('.')
        if parent not in children:
            children[parent] = set()
            while parent := parent.rpartition('.')[0]:
                if parent in children:
                    break
                children[parent] = set()
            parent = name.rpartition('.')[0]
        children[parent].add(leaf)
    return children


def _shape_fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(w is None or f == w for f, w in zip(found, wanted))


def _read_bytes(stored: StoredTensor, offset: int, count: int) -> Tensor:
    """``count`` bytes from ``offset`` within the tensor: ``[count] uint8`` with memory of its own."""
    buffer = torch.empty(count, dtype=torch.uint8)
    if count:
        stored.file.read_into(stored.offset + offset, buffer.numpy().data)
    return buffer


def _read_raw(stored: StoredTensor) -> Tensor:
    data = _read_bytes(stored, 0, stored.nbytes)
    if stored.dtype_name in BLOCK_TYPES:
        return _restore(stored, data.view(*stored.shape[:-1], -1))
    return _restore(stored, data.view(DTYPES[stored.dtype_name]).view(stored.shape))


def _restore(stored: StoredTensor, rows: Tensor) -> Tensor:
    """Undo what a converter did to rows (of elements or of blocks) and values."""
    if stored.heads:
        half = rows.shape[0] // stored.heads // 2
        rows = rows.view(stored.heads, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
    return rows - stored.shift if stored.shift else rows


def _read_blocks(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """Read and dequantise piece by piece: beyond the result, memory stays at a few MiB.

    Threads take whole pieces and never wait for each other, as torch's own threads would after every step: on a
    machine that is busy otherwise, that waiting costs ten times the work.
    """
    elements, nbytes = BLOCK_SIZES[stored.dtype_name]
    out = torch.empty(stored.shape, dtype=dtype)
    flat = out.view(-1)
    blocks = prod(stored.shape) // elements
    step = 8 * CHUNK_ELEMENTS // elements

    def read_piece(start: int) -> None:
        count = min(step, blocks - start)
        piece = _read_bytes(stored, start * nbytes, count * nbytes)
        dequantize_into(piece, stored.dtype_name, flat[start * elements : (start + count) * elements])

    with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS)) as pool:
        for _ in pool.map(read_piece, range(0, blocks, step)):
            pass  # raises what a piece raised
    return _restore(stored, out)
