"""ModelRunner: one rank's device side, from a plan to a launched step.

Life: ``start`` (read headers, share out memory, load, allocate), then ``run`` for every step in order, then ``stop``.
A step: slots change, inputs are built, the model runs, the wanted positions give logits, tokens are drawn.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.model import ModelConfig
from lmdeploy.config.vision import is_vision_model, read_preprocessor, read_vision
from lmdeploy.engine.plan import OUTPUT_NONE, PictureRoom, StepPlan
from lmdeploy.errors import ConfigError
from lmdeploy.kv.cache import KVCache
from lmdeploy.log import get_logger
from lmdeploy.models.registry import CausalLM, build_model, decoder_spec
from lmdeploy.models.shapes import tensor_shapes
from lmdeploy.models.stored import bytes_of_blocks, bytes_per_weight
from lmdeploy.models.vision.encoder import build_encoder
from lmdeploy.nn.build import Build
from lmdeploy.ops.cpu.features import auto_dtype
from lmdeploy.parallel.group import ALONE, Group
from lmdeploy.quant.kernels.cpu import keeps_blocks
from lmdeploy.quant.policy import QuantPolicy
from lmdeploy.runner import inputs
from lmdeploy.runner.batch import ForwardBatch
from lmdeploy.runner.encoder import PictureEncoder, kept_bytes, parameters, picture_room
from lmdeploy.runner.graphs import CudaGraphs, GraphRunner, GraphStep, Kind, Record
from lmdeploy.runner.handle import Launched
from lmdeploy.runner.host import limit_threads, return_freed_memory
from lmdeploy.runner.memory import (
    BASE_WORKSPACE,
    MemoryPlan,
    Room,
    agree,
    gib,
    graph_bytes,
    measure,
    name_of,
    plan_memory,
    weight_bytes,
)
from lmdeploy.runner.mixed import MixedGraphs, MixedStep
from lmdeploy.runner.profile import idle_plans, idle_report, peak_bytes
from lmdeploy.runner.sampler import Sampler, Sites
from lmdeploy.runner.slots import ROWS_ALL, ROWS_NONE, SlotTable
from lmdeploy.runner.tables import send
from lmdeploy.weights.checkpoint import Checkpoint, open_checkpoint
from lmdeploy.weights.dummy import DummyCheckpoint, read_config

LAUNCH_BOUND = 4e12  # parameters times tokens of a step that a GPU runs in the time in which the host launches it
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
DEVICE_DTYPES = {'cpu': ('float32', 'bfloat16'), 'cuda': ('float32', 'bfloat16', 'float16')}


class ModelRunner:
    """Holds model, KV cache and slots on one device.

    Args:
        engine: what the user asked for.
        path: model folder or ``.gguf`` file.
        model_config, checkpoint: those of ``path``, where they are open already.
        record: makes the graphs; None: the device's own, and none on a CPU.
        group: the ranks that share the model, of which this is one.

    Attributes:
        model_config, dtype, device, generation_config, plan: known after :meth:`start`.
        pictures, picture_room: the vision encoder, and what it is given; None: the model reads text only.
    """

    def __init__(self, engine: EngineConfig, path: Path, *, model_config: ModelConfig | None = None,
                 checkpoint: Checkpoint | None = None, record: Record | None = None, group: Group = ALONE) -> None:
        self.group = group
        self.engine, self.path, self._record = engine, path, record
        self._given_config, self._given_checkpoint = model_config, checkpoint
        self.model_config: ModelConfig
        self.generation_config: dict
        self.dtype: torch.dtype
        self.device: torch.device
        self.plan: MemoryPlan
        self.model: CausalLM
        self.kv: KVCache
        self.slots: SlotTable
        self.sampler: Sampler
        self.graphs: GraphRunner | None = None
        self.mixed: MixedGraphs | None = None
        self.pictures: PictureEncoder | None = None
        self.picture_room: PictureRoom | None = None

    @torch.no_grad()  # and not inference_mode: weights are read by threads of their own
    def start(self) -> None:
        """Load the model and allocate its cache; what cannot work is refused before a weight is read.

        Raises:
            ConfigError, LoadError: what is wrong with the options, the model, or the memory.
        """
        checkpoint = self._open()
        try:
            free = self._prepare(checkpoint).free
            with self._stage('weights', free):
                build = Build(dtype=self.dtype, device=self.device, group=self.group,
                              kv_bits=self.engine.quant_policy, exact=self.engine.exact,
                              head=self.engine.head)  # fmt: skip
                self.model = build_model(self.model_config, build)
                if self.device.type != 'cpu':
                    checkpoint.upload_to(self.device)
                self.model.load(checkpoint.prefix())
                if self.pictures is not None:
                    self.pictures.encoder.load(checkpoint.prefix())
            vision_ignore = self.pictures.encoder.ignore if self.pictures is not None else ()
            checkpoint.finish(self.model.ignore + vision_ignore)
        finally:
            checkpoint.close()
        return_freed_memory()
        on_gpu = self.device.type != 'cpu'
        with_tables = self._record is not None or on_gpu
        mrope = self.pictures is not None and self.pictures.encoder.config.mrope
        self.slots = SlotTable(self.plan.max_batch_size, self.plan.session_len, self.engine.block_size, self.device,
                               self.model_config.vocab_size if with_tables else None, mrope=mrope)
        if on_gpu:
            with self._stage('the largest step', free):
                self.plan = self._measured()
        with self._stage('KV cache', free):
            self.kv = KVCache(self.model.kv_shape, self.plan.num_blocks, self.engine.block_size, self.dtype,
                              self.device)  # fmt: skip
        self.sampler = Sampler(self.slots, self.group)
        if with_tables:
            with self._stage('all kinds of steps', free):
                self._warm_up()
        if self.engine.runner == 'graph':
            with self._stage('graphs', free):
                self._record_graphs()

    def stop(self) -> None:
        """Let go of model and cache; safe to call twice."""
        self.graphs = self.mixed = self.pictures = None
        for name in ('model', 'kv', 'slots', 'sampler'):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_initialized():
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        return_freed_memory()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Launched | GraphStep | MixedStep:
        """Launch a step; on a CPU it has run when this returns.

        Raises:
            RuntimeError: what the device says; not that memory ran out, which is a status of the step's rows.
        """
        for slot in plan.closed:
            self.slots.close(slot)
        for request in plan.opened:
            self.slots.open(request)
        self.slots.flush()
        lost = self._encode(plan) if self.pictures is not None else ''
        if not plan.rows:
            return Launched(plan.step, 0, lost=lost).send(self.device)
        if lost or plan.places:
            return self._with_pictures(plan, lost)
        if self.graphs is not None and (key := self.graphs.find(plan)) is not None:
            if key[1] is not Kind.FORWARD:
                return self.graphs.launch(key, plan)
            forward = self.graphs.forward(key, plan)
            return self._with_memory(plan, lambda: self._sample(plan, forward()))
        self.slots.append(plan.slots, plan.block_start, plan.blocks)
        if self.mixed is not None and (mixed := self.mixed.find(plan)) is not None:
            return self.mixed.launch(mixed, plan)
        batch, outputs = inputs.build(plan, self.slots)
        return self._with_memory(plan, lambda: self._step(plan, batch, outputs))

    def _with_pictures(self, plan: StepPlan, lost: str) -> Launched:
        """A step some of whose tokens are those of pictures, or for whose pictures there was no memory."""
        assert self.pictures is not None
        self.slots.append(plan.slots, plan.block_start, plan.blocks)
        if lost:
            return Launched(plan.step, plan.rows, failure=lost, lost=lost).send(self.device)
        batch, outputs = inputs.build(plan, self.slots)
        encoder = self.pictures

        def step() -> Launched:
            batch.embeds = encoder.embeds(plan.places)
            return self._step(plan, batch, outputs)

        return self._with_memory(plan, step)

    def _encode(self, plan: StepPlan) -> str:
        """Forget and encode pictures; why there was no memory for it."""
        assert self.pictures is not None
        for _ in range(2):
            try:
                self.pictures.run(plan)
                return ''
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                cause = f'pictures: {str(error).splitlines()[0][:200]}'
            self._free_unused()
        get_logger().error('memory ran out for %s', cause)
        self.pictures.lose(plan)
        return cause

    def _free_unused(self) -> None:
        gc.collect()
        if self.device.type != 'cpu':
            torch.cuda.empty_cache()

    def choices(self) -> dict[str, str]:
        """What really runs, for the start line."""
        runner = 'eager' if self.graphs is None else 'graph'
        chosen = {'runner': runner, 'dtype': name_of(self.dtype)} | self.model.choices()
        chosen['cache'] = self.kv.format.name
        if self.device.type == 'cpu':
            chosen['threads'] = str(self.threads)
        return chosen

    def time_graphs(self, on: bool) -> list[tuple[int, float]]:
        """See :meth:`GraphRunner.time`; nothing without one."""
        return [] if self.graphs is None else self.graphs.time(on)

    # -- starting ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run every kind of step once, greedy and not, so that nothing is compiled while requests wait."""
        scratch = self.slots.size
        recorded = self.engine.runner == 'graph' and self.model.static
        for plan in idle_plans(self.plan, scratch, recorded):
            for greedy in (True, False):
                self.slots.plain[scratch] = greedy
                batch, outputs = inputs.build(plan, self.slots)
                self._step(plan, batch, outputs).result()
        self.slots.plain[scratch] = True
        idle_report(self.slots, self.model_config.vocab_size)

    def _record_graphs(self) -> None:
        """Graphs where the device has them and the model can be recorded."""
        record = self._record
        if record is None and self.device.type != 'cpu' and self.model.static:
            record = CudaGraphs(self.device)
        if record is None:
            get_logger().info('the graph runner is not used on %s with %s attention: the eager runner is',
                              self.device.type, self.model.choices()['attention'])  # fmt: skip
            return
        self.graphs = GraphRunner(self.model, self.kv, self.slots, self.plan.max_batch_size, record)
        self.graphs.capture()
        parameters = weight_bytes(self.model_config, 1, packed=False)
        self.mixed = MixedGraphs(self.model, self.kv, self.slots, self.plan.max_batch_size, record,
                                 int(LAUNCH_BOUND / parameters))  # fmt: skip
        self.mixed.capture()
        if self.pictures is not None:
            self.pictures.record(record)

    @contextmanager
    def _stage(self, name: str, free: int) -> Iterator[None]:
        """A part of the start: how long it takes, and what it means that memory runs out in it."""
        begin = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ConfigError('LMD-210', device=self.device, stage=name, free=gib(free)) from error
        get_logger().info('start: %s: %.1f s', name, time.perf_counter() - begin)

    def _prepare(self, checkpoint: Checkpoint) -> Room:
        """Everything that can be refused without reading a weight; the memory that is free."""
        engine = self.engine
        config = self._given_config or self._read_config(checkpoint, engine.session_len)
        self.generation_config = checkpoint.generation_config
        self.device = self.group.device or choose_device(engine.device)
        self.dtype = choose_dtype(engine.dtype, self.device, config.dtype_name)
        self.threads = limit_threads()
        room = self._without_pictures(measure(self.device), checkpoint, config)
        stored = bytes_per_weight(config, self.dtype, self.device)
        if not engine.exact and keeps_blocks(self.device, self.dtype):
            stored = bytes_of_blocks(checkpoint) or stored
        self.plan = agree(plan_memory(engine, config, self.dtype, room, stored=stored, group=self.group), self.group)
        if self.plan.session_len != (engine.session_len or config.context_len):
            get_logger().warning(
                'session_len is %d: the KV cache does not hold the %d tokens that the model could read',
                self.plan.session_len, config.context_len)  # fmt: skip
            config = self._given_config or self._read_config(checkpoint, self.plan.session_len)
        elif self.plan.session_len > config.context_len and config.rope.length <= config.context_len:
            get_logger().warning('session_len=%d is more than the %d tokens that the model was made for',
                                 self.plan.session_len, config.context_len)  # fmt: skip
        self.model_config = config
        return room

    def _without_pictures(self, room: Room, checkpoint: Checkpoint, config: ModelConfig) -> Room:
        """What is left of ``room`` for the decoder, where the model has a vision encoder, which is made here."""
        if not is_vision_model(checkpoint.config):
            return room
        vision = read_vision(checkpoint.config, read_preprocessor(self.path))
        build = Build(dtype=self.dtype, device=self.device, group=self.group,
                      policy=QuantPolicy(config.quantization))  # fmt: skip
        self.pictures = PictureEncoder(build_encoder(vision, build))
        numbers = parameters(self.pictures.encoder)
        decoder = weight_bytes(config, self.dtype.itemsize, packed=False)
        self.picture_room = picture_room(vision, self.device.type, self.dtype.itemsize, decoder, numbers,
                                         self.engine.max_pictures)  # fmt: skip
        kept = kept_bytes(self.picture_room, vision, self.dtype.itemsize)
        return replace(room, free=room.free - numbers * self.dtype.itemsize - kept)

    def _open(self) -> Checkpoint:
        if self.engine.load_format != 'dummy':
            return self._given_checkpoint or open_checkpoint(self.path)
        values = read_config(self.path)
        config = ModelConfig.from_dict(values, session_len=self.engine.session_len,
                                       rope_scaling_factor=self.engine.rope_scaling_factor)  # fmt: skip
        shapes = tensor_shapes(decoder_spec(config))
        if is_vision_model(values):
            vision = read_vision(values, read_preprocessor(self.path))
            build = Build(dtype=torch.float32, device=torch.device('cpu'))
            shapes = {**shapes, **build_encoder(vision, build).shapes()}
        return DummyCheckpoint(self.path, values, shapes, choose_device(self.engine.device))

    def _read_config(self, checkpoint: Checkpoint, session_len: int | None) -> ModelConfig:
        return ModelConfig.from_dict(checkpoint.config, session_len=session_len,
                                     rope_scaling_factor=self.engine.rope_scaling_factor)  # fmt: skip

    def _measured(self) -> MemoryPlan:
        """The plan anew, when the weights lie in a GPU's memory, with what the largest step really takes."""
        peak = peak_bytes(self.model, self.slots, self.plan, self.dtype)
        graphs = graph_bytes(self.engine, self.model_config, self.plan.max_batch_size)
        get_logger().info('the largest step takes %s', gib(peak))
        sized = replace(self.engine, session_len=self.plan.session_len)  # which the model was built for
        room = measure(self.device)
        if self.pictures is not None and self.picture_room is not None:
            peak = max(peak, self.pictures.peak_bytes())
            kept = kept_bytes(self.picture_room, self.pictures.encoder.config, self.dtype.itemsize)
            room = replace(room, free=room.free - kept)
        plan = plan_memory(sized, self.model_config, self.dtype, room, weights=0,
                           workspace=BASE_WORKSPACE + peak + graphs, group=self.group)  # fmt: skip
        return agree(plan, self.group)

    # -- a step --------------------------------------------------------------------------------------------------------

    def _step(self, plan: StepPlan, batch: ForwardBatch, outputs: inputs.Outputs) -> Launched:
        out = self.model(batch, self.kv)
        launched = Launched(plan.step, plan.rows)
        if not len(outputs.rows):
            return launched.send(self.device)
        drawn = np.zeros(len(outputs.rows), bool)
        drawn[outputs.sampled] = True
        for row, at in self._wanted(plan, outputs, drawn, self.slots.hidden_rows[plan.slots]):
            launched.hidden[row] = out[send(self.device, at)[0]].float()
        logit_rows = self.slots.logit_rows[plan.slots]
        computed = np.flatnonzero(drawn | (logit_rows == ROWS_ALL)[outputs.rows])
        if not len(computed):
            return launched.send(self.device)
        everything = len(computed) == len(outputs.rows)
        logits = self.model.logits(out if everything else out[send(self.device, computed)[0]])
        place = np.zeros(len(outputs.rows), np.int64)
        place[computed] = np.arange(len(computed))
        for row, at in self._wanted(plan, outputs, drawn, logit_rows):
            launched.logits[row] = logits[send(self.device, place[at])[0]]  # a copy: sampling changes logits in place
        if len(outputs.sampled):
            if len(outputs.sampled) < len(computed):
                logits = logits[send(self.device, place[outputs.sampled])[0]]
            launched.sampled = self.sampler(logits, _sites(plan, outputs))
        return launched.send(self.device)

    def _sample(self, plan: StepPlan, logits: Tensor) -> Launched:
        """The rest of a step of single tokens, each of which draws from its row of ``logits``."""
        launched = Launched(plan.step, plan.rows)
        outputs = inputs.single_outputs(plan)
        for row in np.flatnonzero(self.slots.logit_rows[plan.slots] != ROWS_NONE).tolist():
            launched.logits[row] = logits[row : row + 1].clone()
        launched.sampled = self.sampler(logits, _sites(plan, outputs))
        return launched.send(self.device)

    def _wanted(self, plan: StepPlan, outputs: inputs.Outputs, drawn: np.ndarray,
                wishes: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(row, its outputs to hand back) for the rows that wish to see any: all of them, or those drawn from."""
        found = []
        for row in np.flatnonzero((wishes != ROWS_NONE) & (plan.outputs != OUTPUT_NONE)).tolist():
            at = np.arange(outputs.start[row], outputs.start[row + 1])
            if wishes[row] != ROWS_ALL:
                at = at[drawn[at]]
            if len(at):
                found.append((row, at))
        return found

    def _with_memory(self, plan: StepPlan, step: Callable[[], Launched]) -> Launched:
        """Run ``step``; if memory runs out, free what can be freed and try once more; then the step has failed.

        With several ranks there is no second time: the others wait within the first.
        """
        if self.group.size > 1:
            return step()
        try:
            return step()
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            get_logger().warning('memory ran out in a step of %d tokens; trying once more', plan.num_tokens)
        self._free_unused()
        try:
            return step()
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            cause = f'{plan.num_tokens} tokens: {str(error).splitlines()[0][:200]}'
            get_logger().error('memory ran out in a step of %s', cause)
        return Launched(plan.step, plan.rows, failure=cause).send(self.device)


def choose_device(name: str, rank: int = 0, size: int = 1) -> torch.device:
    """``'auto'``: the GPU if there is one. With several ranks each has its own, the one of its number.

    Raises:
        ConfigError: LMD-206: it is not there; LMD-226: there are fewer than ranks.
    """
    present = torch.cuda.is_available()
    if name == 'cpu' or (name == 'auto' and not present):
        return torch.device('cpu')
    if not present:
        raise ConfigError('LMD-206', device=name, torch=torch.__version__)
    if size == 1 and rank == 0:
        return torch.device('cuda', torch.cuda.current_device())
    if torch.cuda.device_count() < max(size, rank + 1):
        raise ConfigError('LMD-226', value=size, devices=torch.cuda.device_count())
    torch.cuda.set_device(rank)
    return torch.device('cuda', rank)


def choose_dtype(name: str, device: torch.device, stored: str) -> torch.dtype:
    """The type of weights and activations.

    ``'auto'`` on a CPU is bfloat16 where the processor multiplies it, else float32; on a GPU it is the checkpoint's own
    16-bit type, and bfloat16 for a checkpoint in float32.

    Raises:
        ConfigError: LMD-205: this device does not compute in it.
    """
    possible = DEVICE_DTYPES[device.type]
    if name == 'auto':
        if device.type == 'cpu':
            return auto_dtype()
        name = stored if stored in ('bfloat16', 'float16') else 'bfloat16'
        if name == 'bfloat16' and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = 'float16'
    if name not in possible:
        raise ConfigError('LMD-205', dtype=name, device=device.type, choices=', '.join(('auto', *possible)))
    return DTYPES[name]


def _sites(plan: StepPlan, outputs: inputs.Outputs) -> Sites:
    """Where tokens are drawn."""
    rows = outputs.rows[outputs.sampled]
    sampling, counts = np.unique(rows, return_counts=True)
    tokens = outputs.tokens[outputs.sampled]
    last = tokens + 1 == plan.query_start[rows + 1]
    sites = Sites(
        rows=sampling,
        slots=plan.slots[rows].astype(np.int64),
        positions=outputs.positions[outputs.sampled],
        start=np.concatenate([[0], np.cumsum(counts)]),
        drafts=np.where(last, -1, plan.tokens[np.where(last, tokens, tokens + 1)]).astype(np.int64),
    )
    if plan.mask_rows is not None and plan.masks is not None:
        drawing = np.isin(plan.mask_rows, sampling)
        sites.masked = sites.start[np.searchsorted(sampling, plan.mask_rows[drawing])]
        sites.masks = plan.masks[drawing].view(np.int32)
    return sites


def _out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
