"""How much memory there is, and how it is shared out: weights, workspace of a step, KV cache.

:func:`plan_memory` is arithmetic on sizes and runs before a weight is read, so that a model that cannot fit is refused
at once, with the numbers. What the user named is honoured or refused, never changed; only defaults adapt:

* ``session_len`` is the model's own context, or as much of it as the cache holds;
* on a CPU the cache takes at most 2 GiB (more only where one named session needs it), so that several pipelines fit;
* no more blocks are made than ``max_batch_size`` sessions fill, unless a prefix cache has use for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.model import ModelConfig
from lmdeploy.errors import ConfigError
from lmdeploy.kv.cache import KVShape
from lmdeploy.kv.format import format_of
from lmdeploy.parallel.group import ALONE, Group
from lmdeploy.parallel.heads import share_heads
from lmdeploy.runner.host import free_host_memory
from lmdeploy.runner.tables import DeviceTables

CPU_CACHE_CAP = 2 << 30
CPU_BATCH, GPU_BATCH, BIG_GPU_BATCH = 16, 128, 512
BIG_GPU = 64 << 30
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 512, 8192
LEAST_SESSION = 256  # tokens; a default context is not reduced below this
BASE_WORKSPACE = 128 << 20  # allocator slack, index tensors, the runtime's own buffers
GRAPHS = 512 << 20  # recorded launches of all graphs, their intermediate tensors without logits, compiled kernels


@dataclass(frozen=True, slots=True)
class Room:
    """A device's memory before anything is loaded, in bytes."""

    free: int
    total: int
    on_cpu: bool


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Who gets what; sizes in bytes."""

    weights: int
    workspace: int
    block: int  # of one KV block in all layers
    num_blocks: int
    session_len: int
    max_batch_size: int
    max_step_tokens: int

    @property
    def cache(self) -> int:
        """Bytes of the KV cache, its null block included."""
        return (self.num_blocks + 1) * self.block


def measure(device: torch.device) -> Room:
    """The memory that is free on ``device`` now."""
    if device.type == 'cpu':
        return Room(*free_host_memory(), on_cpu=True)
    free, total = torch.cuda.mem_get_info(device)
    return Room(free, total, on_cpu=False)


def plan_memory(engine: EngineConfig, model: ModelConfig, dtype: torch.dtype, room: Room, *,
                weights: int | None = None, workspace: int | None = None, stored: float | None = None,
                group: Group = ALONE) -> MemoryPlan:  # fmt: skip
    """Share out ``room``.

    Args:
        group: the ranks that share the model; on a CPU they share the room as well.
        weights: bytes that the weights will still take; None: what the model's shape says.
        stored: bytes of one weight of the layers, on average; None: they are dense.
        workspace: bytes that will be needed beside weights and cache; None: what the sizes say.

    Raises:
        ConfigError: LMD-201, LMD-208 one session does not fit, LMD-202 the weights do not, LMD-203 the named number of
            blocks does not, LMD-204 the named number of blocks holds less than the named session.
    """
    itemsize = dtype.itemsize
    if room.on_cpu:
        room = replace(room, free=room.free // group.size, total=room.total // group.size)
    gpu_batch = BIG_GPU_BATCH if room.total >= BIG_GPU else GPU_BATCH
    batch = engine.max_batch_size or (CPU_BATCH if room.on_cpu else gpu_batch)
    usual = CPU_STEP_TOKENS if room.on_cpu else GPU_STEP_TOKENS
    step = min(engine.max_step_tokens or usual, usual)
    keys = share_heads(model.num_heads, model.num_kv_heads, group.rank, group.size).keys
    shape = KVShape(model.num_layers, len(keys), model.head_dim)
    plan = MemoryPlan(
        weights=weight_bytes(model, itemsize, room.on_cpu, stored) // group.size if weights is None else weights,
        workspace=_workspace(engine, model, itemsize, batch, step, room) if workspace is None else workspace,
        block=shape.bytes_per_block(engine.block_size, format_of(engine.quant_policy, dtype)),
        num_blocks=0,
        session_len=engine.session_len or model.context_len,
        max_batch_size=batch,
        max_step_tokens=step,
    )
    left = room.free - plan.weights - plan.workspace
    table = model.vocab_size * model.hidden_size * 4  # the largest tensor, once more in float32 while it is read
    needed = plan.weights + max(plan.workspace + 4 * plan.block, table if plan.weights else 0)
    if needed > room.free:
        raise ConfigError('LMD-202', needed=gib(needed), free=gib(room.free),
                          weights=gib(plan.weights), workspace=gib(plan.workspace), dtype=name_of(dtype))  # fmt: skip
    if engine.num_blocks is not None:
        return _with_blocks(plan, engine, left, engine.num_blocks)
    return _with_share(plan, engine, room, left)


def _with_blocks(plan: MemoryPlan, engine: EngineConfig, left: int, num_blocks: int) -> MemoryPlan:
    """The user named the number of blocks."""
    size = engine.block_size
    if (num_blocks + 1) * plan.block > left:
        raise ConfigError('LMD-203', num_blocks=num_blocks, needed=gib((num_blocks + 1) * plan.block), left=gib(left),
                          fits=left // plan.block - 1)  # fmt: skip
    if engine.session_len is None:
        return replace(plan, num_blocks=num_blocks, session_len=min(plan.session_len, num_blocks * size))
    if engine.session_len > num_blocks * size:
        raise ConfigError('LMD-204', session_len=engine.session_len, num_blocks=num_blocks, fits=num_blocks * size,
                          needed=-(-engine.session_len // size))  # fmt: skip
    return replace(plan, num_blocks=num_blocks)


def _with_share(plan: MemoryPlan, engine: EngineConfig, room: Room, left: int) -> MemoryPlan:
    """A share of what is left after weights and workspace."""
    size = engine.block_size
    most = int(left * engine.cache_share) // plan.block - 1
    if engine.session_len is not None:
        least = -(-engine.session_len // size)
    else:
        least = -(-min(plan.session_len, LEAST_SESSION) // size)
    if most < least:
        needed = (least + 1) * plan.block
        inside = needed <= left  # within the memory, though not within the share of it
        raise ConfigError(
            'LMD-201' if inside else 'LMD-208', session_len=engine.session_len or least * size, needed=gib(needed),
            share=engine.cache_share, left=gib(left), free=gib(room.free), weights=gib(plan.weights),
            workspace=gib(plan.workspace), fits=max(0, most) * size, blocks=least, batch=plan.max_batch_size,
            missing=gib(int(needed / engine.cache_share) - left + (1 << 20)))  # fmt: skip
    blocks = most
    if room.on_cpu:
        blocks = min(most, max(CPU_CACHE_CAP // plan.block - 1, least))
    session_len = plan.session_len if engine.session_len is not None else min(plan.session_len, blocks * size)
    if not engine.prefix_caching:
        blocks = min(blocks, plan.max_batch_size * -(-session_len // size))
    return replace(plan, num_blocks=blocks, session_len=session_len)


def agree(plan: MemoryPlan, group: Group) -> MemoryPlan:
    """``plan`` with what all ranks have room for; every rank calls this."""
    if group.size == 1:
        return plan
    mine = torch.tensor([[plan.num_blocks, plan.session_len, plan.max_batch_size, plan.max_step_tokens]])
    least = group.exchange(mine).amin(0).tolist()
    return replace(plan, num_blocks=least[0], session_len=least[1], max_batch_size=least[2], max_step_tokens=least[3])


def weight_bytes(model: ModelConfig, itemsize: int, packed: bool, stored: float | None = None) -> int:
    """Bytes of the weights. ``packed`` kernels keep a tied head beside the embedding, in their own layout.

    ``stored``: those of one weight of the layers' matrices, where they are not dense.
    """
    hidden, heads, kv_heads, dim = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
    attention = hidden * dim * (2 * heads + 2 * kv_heads) + dim * (heads + 2 * kv_heads) + hidden
    mlp = 3 * hidden * model.intermediate_size
    layer = attention + mlp + 4 * hidden + 2 * dim  # norms
    ends = model.vocab_size * hidden * (1 if model.tie_word_embeddings and not packed else 2)
    saved = 0 if stored is None else int(model.num_layers * (attention + mlp) * (itemsize - stored))
    return (model.num_layers * layer + ends + hidden) * itemsize - saved


def workspace_bytes(model: ModelConfig, itemsize: int, batch: int, step_tokens: int) -> int:
    """Bytes that one step needs at most beside weights and cache: activations of a layer, logits and their copies."""
    inner = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 2 * model.intermediate_size
    activations = step_tokens * (6 * model.hidden_size + 2 * inner) * max(itemsize, 4)
    logits = 3 * batch * model.vocab_size * 4
    return BASE_WORKSPACE + activations + logits


def graph_bytes(engine: EngineConfig, model: ModelConfig, batch: int) -> int:
    """Bytes of the recorded graphs, with the logits of the largest batch."""
    return GRAPHS + 8 * batch * model.vocab_size if engine.runner == 'graph' else 0


def _workspace(engine: EngineConfig, model: ModelConfig, itemsize: int, batch: int, step: int, room: Room) -> int:
    """All of :func:`workspace_bytes`, and on a GPU the tables of slots and the graphs."""
    size = workspace_bytes(model, itemsize, batch, step)
    if room.on_cpu:
        return size
    session_len = engine.session_len or model.context_len
    tables = DeviceTables.nbytes(batch, session_len, engine.block_size, model.vocab_size)
    return size + tables + graph_bytes(engine, model, batch)


def gib(size: int) -> str:
    """``'1.25 GiB'``, or ``'12 MiB'`` where that says more."""
    return f'{size / 2**30:.2f} GiB' if abs(size) >= 1 << 29 else f'{size / 2**20:.0f} MiB'


def name_of(dtype: torch.dtype) -> str:
    """``'bfloat16'``."""
    return str(dtype).removeprefix('torch.')
