"""What makes a folder of shards a model that everybody loads: configuration, index, tokenizer, templates."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lmdeploy.config.quantization import AWQ, COMPRESSED, FLOAT, FP8, GPTQ, INT, PACK, SMOOTH, Storage
from lmdeploy.lite.recipe import ROLES, SITES, Recipe
from lmdeploy.lite.rotated import transform_config
from lmdeploy.lite.source import Source
from lmdeploy.lite.workdir import WorkDir
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.tokenizer.export import tokenizer_files
from lmdeploy.version import __version__

INDEX = 'model.safetensors.index.json'
METHODS = {PACK: COMPRESSED, INT: COMPRESSED, FLOAT: COMPRESSED}
COMPRESSED_VERSION = '0.20.0'  # of compressed-tensors, whose format this is
MAX_COPIED = 256 << 20  # bytes of a file beside the weights
NESTED = ('llm_config', 'text_config', 'language_config')
NOT_COPIED = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.gguf', '.h5', '.msgpack', '.onnx', '.index.json', '.md')


def placed(source: Source, recipe: Recipe) -> dict[str, Storage | None]:
    """How each linear layer is stored, by full name."""
    names = source.linear_names()
    return {f'{source.layer_path(i)}.{names[role]}': recipe.storage(i, site)
            for i in range(source.num_layers) for site in SITES for role in ROLES[site]}  # fmt: skip


def quantization_config(source: Source, recipe: Recipe) -> dict[str, object]:
    """The ``quantization_config`` of the output's config.json.

    Most layers are stored in one way; those in another are named. Dense layers, the output layer and everything outside
    of the language model are listed as not quantised.
    """
    whole = placed(source, recipe)
    where = {name: None if storage is None else replace(storage, transform='') for name, storage in whole.items()}
    storages = Counter(storage for storage in where.values() if storage is not None)
    main = storages.most_common(1)[0][0]
    dense = [name for name, storage in where.items() if storage is None]
    outside = sorted({name.partition('.')[0] for name in source.others})
    ignored = [source.head.path, *outside, *dense]
    method = METHODS.get(main.format, main.format)
    if method == COMPRESSED:
        config = _compressed(where, list(storages), main, ignored)
    else:
        config = {'quant_method': method} | _PLAIN[method](main, ignored)
        if len(storages) > 1:
            if method != GPTQ:
                raise ValueError(f'{method} stores all layers in one way')
            others = {name: s for name, s in where.items() if s is not None and s != main}
            config['dynamic'] = {
                f'^{_escaped(name)}$': {'bits': s.bits, 'group_size': s.group or -1, 'sym': s.symmetric}
                for name, s in others.items()}  # fmt: skip
    return config | _transforms(whole) | recipe.extra_config()


def write_output(source: Source, recipe: Recipe, work: WorkDir, tokenizer: Tokenizer | None) -> None:
    """Everything beside the shards; config.json comes last, since it makes the folder a model."""
    if source.path.is_dir():
        copy_beside(source.path, work)
    elif tokenizer is not None:
        for name, content in tokenizer_files(tokenizer).items():
            work.write(name, partial(_write_bytes, content))
        work.write_json('generation_config.json', _generation_config(source, tokenizer))
    weight_map = {name: record.file for _, record in sorted(work.shards.items()) for name in record.tensors}
    total = sum(record.bytes for record in work.shards.values())
    work.write_json(INDEX, {'metadata': {'total_size': total}, 'weight_map': dict(sorted(weight_map.items()))})
    quantization = quantization_config(source, recipe)
    if quantization['quant_method'] == GPTQ:
        work.write_json('quantize_config.json', {k: v for k, v in quantization.items() if k != 'quant_method'})
    work.write_json('config.json', model_config(source, work, quantization))


def model_config(source: Source, work: WorkDir, quantization: dict[str, object]) -> dict[str, Any]:
    """config.json: the source's with ``quantization_config``, the type of the dense tensors, and whether the output
    layer still is the embedding."""
    config = {k: v for k, v in source.checkpoint.config.items() if v is not None}
    dtype = str(source.dtype).removeprefix('torch.')
    tied = source.config.tie_word_embeddings and source.top_names()['head'] not in work.shards[0].tensors
    places = [config]
    for key in NESTED:
        if isinstance(config.get(key), dict):
            config[key] = dict(config[key])
            places.append(config[key])
    for place in places:
        place['quantization_config'] = quantization
        place['dtype' if 'dtype' in place else 'torch_dtype'] = dtype
        if source.config.tie_word_embeddings and not tied:
            place['tie_word_embeddings'] = False
    return config


def copy_beside(folder: Path, work: WorkDir) -> None:
    """Copy what lies beside the weights of a Hugging Face folder: tokenizer, templates, processors, code."""
    for path in sorted(folder.rglob('*')):
        name = path.relative_to(folder)
        plain = path.is_file() and not any(part.startswith('.') for part in name.parts) and len(name.parts) <= 2
        if not plain or name.name.endswith(NOT_COPIED) or str(name) in ('config.json', 'quantize_config.json'):
            continue
        if path.stat().st_size <= MAX_COPIED:
            (work.path / name).parent.mkdir(parents=True, exist_ok=True)
            work.write(str(name), partial(shutil.copyfile, path))


def _generation_config(source: Source, tokenizer: Tokenizer) -> dict[str, object]:
    config: dict[str, object] = dict(source.checkpoint.generation_config)
    if tokenizer.bos_token_id is not None:
        config['bos_token_id'] = tokenizer.bos_token_id
    if tokenizer.eos_token_ids:
        config['eos_token_id'] = sorted(tokenizer.eos_token_ids)
    return config


def _awq(main: Storage, ignored: list[str]) -> dict[str, object]:
    return {'version': 'gemm', 'bits': main.bits, 'group_size': main.group or -1, 'zero_point': not main.symmetric,
            'modules_to_not_convert': ignored}  # fmt: skip


def _gptq(main: Storage, ignored: list[str]) -> dict[str, object]:
    return {'bits': main.bits, 'group_size': main.group or -1, 'sym': main.symmetric, 'desc_act': False,
            'static_groups': True, 'true_sequential': False, 'damp_percent': 0.01, 'lm_head': False,
            'checkpoint_format': 'gptq' if main.zero_shift else 'gptq_v2', 'pack_dtype': 'int32',
            'model_name_or_path': None, 'model_file_base_name': 'model', 'modules_to_not_convert': ignored,
            'meta': {'quantizer': [f'lmdeploy:{__version__}']}}  # fmt: skip


def _smooth(main: Storage, ignored: list[str]) -> dict[str, object]:
    return {'quant_dtype': 'int8' if main.kind == 'int' else main.kind, 'modules_to_not_convert': ignored}


def _fp8(main: Storage, ignored: list[str]) -> dict[str, object]:
    block = {'weight_block_size': [main.rows, main.group]} if main.rows > 1 else {}
    return {'fmt': 'e4m3', 'activation_scheme': 'static' if main.static else 'dynamic', **block,
            'modules_to_not_convert': ignored}  # fmt: skip


_PLAIN = {AWQ: _awq, GPTQ: _gptq, SMOOTH: _smooth, FP8: _fp8}


def _compressed(where: dict[str, Storage | None], storages: list[Storage], main: Storage,
                ignored: list[str]) -> dict[str, object]:  # fmt: skip
    groups = {}
    for i, storage in enumerate(sorted(storages, key=lambda s: s != main)):
        targets = ['Linear'] if storage == main else [f're:^{_escaped(n)}$' for n, s in where.items() if s == storage]
        groups[f'group_{i}'] = _compressed_group(storage, targets)
    return {'quant_method': COMPRESSED, 'format': main.format, 'quantization_status': 'compressed',
            'version': COMPRESSED_VERSION, 'global_compression_ratio': None, 'ignore': ignored,
            'kv_cache_scheme': None, 'config_groups': groups}  # fmt: skip


def _transforms(where: dict[str, Storage | None]) -> dict[str, object]:
    """``transform_config``, where inputs are transformed."""
    targets: dict[str, list[str]] = {}
    for name, storage in where.items():
        if storage is not None and storage.transform:
            targets.setdefault(storage.transform, []).append(f're:^{_escaped(name)}$')
    return {'transform_config': transform_config(targets)} if targets else {}


def _compressed_group(storage: Storage, targets: list[str]) -> dict[str, object]:
    kind = 'int' if storage.kind == 'int' else 'float'
    weights = {'num_bits': storage.bits, 'type': kind, 'symmetric': storage.symmetric, 'dynamic': False,
               'strategy': 'group' if storage.group else 'channel', 'actorder': None, 'observer': 'minmax'}  # fmt: skip
    if storage.group:
        weights['group_size'] = storage.group
    inputs = None
    if storage.activation:
        inputs = {'num_bits': 8, 'type': 'int' if storage.activation == 'int8' else 'float', 'symmetric': True,
                  'strategy': 'token', 'dynamic': True}  # fmt: skip
    return {'format': storage.format, 'targets': targets, 'weights': weights, 'input_activations': inputs,
            'output_activations': None}  # fmt: skip


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _escaped(name: str) -> str:
    return name.replace('.', r'\.')
