"""Small weight files for tests: valid ones by the reference writers, and the means to break them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

CONFIG = {'architectures': ['LlamaForCausalLM'], 'hidden_size': 8}


def safetensors_bytes(header: Any, data: bytes = b'') -> bytes:
    """A file of ``header`` (JSON text, or an object to encode) and ``data``, whether or not they fit."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, config: dict | None = None) -> Path:
    """A Hugging Face folder, written by the safetensors package."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(CONFIG if config is None else config))
    if shards == 1:
        save_file(tensors, folder / 'model.safetensors')
        return folder
    weight_map = {}
    for i in range(shards):
        name = f'model-{i + 1:05}-of-{shards:05}.safetensors'
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {'metadata': {'total_size': size}, 'weight_map': weight_map}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return folder


# hidden, ffn, layers, heads, kv heads, head size, vocabulary of the tiny GGUF models
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 96, 2, 4, 2, 32, 50


def hf_shapes(arch: str, tied: bool = False, bias: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny Hugging Face model of the architecture that GGUF calls ``arch``."""
    shapes: dict[str, tuple[int, ...]] = {'model.embed_tokens.weight': (VOCAB, HIDDEN), 'model.norm.weight': (HIDDEN,)}
    if not tied:
        shapes['lm_head.weight'] = (VOCAB, HIDDEN)
    norms = ['input_layernorm', 'post_attention_layernorm']
    if arch == 'gemma3':
        norms += ['pre_feedforward_layernorm', 'post_feedforward_layernorm']
    for layer in range(LAYERS):
        at = f'model.layers.{layer}.'
        shapes |= {f'{at}{norm}.weight': (HIDDEN,) for norm in norms}
        if arch in ('qwen3', 'gemma3'):
            shapes |= {f'{at}self_attn.{x}_norm.weight': (HEAD_DIM,) for x in 'qk'}
        for x, heads in (('q', HEADS), ('k', KV_HEADS), ('v', KV_HEADS)):
            shapes[f'{at}self_attn.{x}_proj.weight'] = (heads * HEAD_DIM, HIDDEN)
            if bias:
                shapes[f'{at}self_attn.{x}_proj.bias'] = (heads * HEAD_DIM,)
        shapes[f'{at}self_attn.o_proj.weight'] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {f'{at}mlp.{x}_proj.weight': (FFN, HIDDEN) for x in ('gate', 'up')}
        shapes[f'{at}mlp.down_proj.weight'] = (HIDDEN, FFN)
    return shapes


def to_gguf_layout(name: str, value: np.ndarray, arch: str) -> np.ndarray:
    """What llama.cpp's converter does to a Hugging Face tensor."""
    if arch in ('llama', 'internlm2') and ('.q_proj.' in name or '.k_proj.' in name):
        heads = HEADS if '.q_proj.' in name else KV_HEADS
        return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if arch == 'gemma3' and name.endswith('norm.weight'):
        return value + np.float32(1)
    return value


def write_gguf(
    path: Path,
    arch: str = 'llama',
    *,
    tied: bool = False,
    bias: bool = False,
    kind: str = 'F32',
    kinds: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """A tiny model by the gguf package's writer and name tables; returns its Hugging Face tensors in float32.

    Args:
        kind: how matrices whose rows allow it are stored; the returned values are then the dequantised ones.
        kinds: how those are stored instead whose name contains the key, as files of several types have it.
        extra: metadata to add or override; keys may start with ``arch.``, values None leave a key out.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    prefix = 'gemma3' if arch == 'gemma3' else arch
    metadata = {
        f'{prefix}.context_length': 256,
        f'{prefix}.embedding_length': HIDDEN,
        f'{prefix}.feed_forward_length': FFN,
        f'{prefix}.block_count': LAYERS,
        f'{prefix}.attention.head_count': HEADS,
        f'{prefix}.attention.head_count_kv': KV_HEADS,
        f'{prefix}.attention.key_length': HEAD_DIM,
        f'{prefix}.attention.layer_norm_rms_epsilon': 1e-6,
        f'{prefix}.rope.freq_base': 500000.0,
        'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.tokens': [f'tok{i}é' for i in range(VOCAB)],
        'tokenizer.ggml.token_type': [1] * VOCAB,
    }
    if arch == 'gemma3':
        metadata['gemma3.attention.sliding_window'] = 64
    metadata |= {key.replace('arch.', f'{prefix}.', 1): value for key, value in (extra or {}).items()}
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), LAYERS)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in hf_shapes(arch, tied, bias).items():
        value = to_gguf_layout(name, rng.standard_normal(shape, dtype=np.float32), arch)
        gguf_name = names.get_name(name, try_suffixes=('.weight', '.bias'))
        chosen = next((other for part, other in (kinds or {}).items() if part in name), kind)
        block_type = gguf.GGMLQuantizationType[chosen]
        if len(shape) == 2 and shape[1] % gguf.GGML_QUANT_SIZES[block_type][0] == 0:
            stored = gguf.quants.quantize(value, block_type)
            value = gguf.quants.dequantize(stored, block_type)
            writer.add_tensor(gguf_name, stored, raw_dtype=block_type)
        else:
            writer.add_tensor(gguf_name, value)
        tensors[name] = from_gguf_layout(name, value, arch)
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def from_gguf_layout(name: str, value: np.ndarray, arch: str) -> np.ndarray:
    """The inverse of :func:`to_gguf_layout`, by index: row ``h, j, i`` is where row ``h, i, j`` came from."""
    if arch in ('llama', 'internlm2') and ('.q_proj.' in name or '.k_proj.' in name):
        heads = HEADS if '.q_proj.' in name else KV_HEADS
        order = np.arange(len(value)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        restored = np.empty_like(value)
        restored[order] = value
        return restored
    if arch == 'gemma3' and name.endswith('norm.weight'):
        return value - np.float32(1)
    return value


EXTREMES = [0, 1, 2, 7, 8, 9, 31, 0x7F, 0xFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]


@st.composite
def mutations(draw: st.DrawFn, original: bytes, region: int) -> bytes:
    """``original`` after one to four edits within its first ``region`` bytes: flips, numbers, cuts, insertions."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(region, len(content)) - 1)))
        edit = draw(st.sampled_from(['byte', 'u32', 'u64', 'delete', 'insert', 'repeat', 'cut']))
        if edit == 'byte':
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif edit == 'u32':
            content[at : at + 4] = struct.pack('<I', draw(st.sampled_from(EXTREMES)) & 0xFFFFFFFF)
        elif edit == 'u64':
            content[at : at + 8] = struct.pack('<Q', draw(st.sampled_from(EXTREMES)))
        elif edit == 'delete':
            del content[at : at + draw(st.integers(1, 16))]
        elif edit == 'insert':
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif edit == 'repeat':
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
        else:
            del content[at:]
    return bytes(content)
