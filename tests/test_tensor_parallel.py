"""Several ranks give the tokens of one: every architecture, every format, also where heads and widths do not divide.

Inputs that are quantised are so on each rank, by the largest of its own channels: such models are not compared here.

The ranks are threads here, over the transport of processes; tests/executor has the processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.plan import StepPlan
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.base import Capacity
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.parallel.distributed import connect, local_store
from lmdeploy.parallel.group import ALONE
from tests.models.tiny import ARCHITECTURES, VOCAB, make_tiny
from tests.quant.formats.folders import MODELS, write_pair

T = TypeVar('T')
NEW = 12
PLAIN_INPUTS = [name for name, model in MODELS.items() if not model.activation or model.input_scale]


class Threads:
    """An executor whose ranks are threads of this process."""

    def __init__(self, config: EngineConfig, path: Path, size: int, meeting: Path) -> None:
        self.config, self.path, self.size, self.meeting = config, path, size, meeting
        self.ranks: list[LocalExecutor] = [None] * size  # type: ignore[list-item]

    def each(self, work: Callable[[int], T]) -> list[T]:
        """``work`` on every rank at once."""
        results: list[Any] = [None] * self.size

        def run(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:  # raised again below
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def start(self) -> Capacity:
        def start(rank: int) -> Capacity:
            group = ALONE
            if self.size > 1:
                group = connect(local_store(self.meeting, self.size), rank, self.size, torch.device('cpu'))
            self.ranks[rank] = LocalExecutor(self.config, self.path, group=group)
            return self.ranks[rank].start()

        capacities = self.each(start)
        assert len({(one.num_blocks, one.session_len) for one in capacities}) == 1
        return capacities[0]

    def launch(self, plan: StepPlan) -> Any:
        return self.each(lambda rank: self.ranks[rank].launch(plan))[0]


def tokens(path: Path, size: int, meeting: Path, **options: Any) -> list[list[int]]:
    """Greedy tokens of four prompts that run together."""
    meeting.mkdir()
    config = EngineConfig(device='cpu', dtype='float32', num_blocks=48, max_batch_size=4, **options)
    executor = Threads(config, path, size, meeting)
    core = EngineCore(executor, executor.start())
    generator = torch.Generator().manual_seed(11)
    found: dict[str, list[int]] = {}
    for number, length in enumerate((40, 1, 66, 9)):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        core.submit(EngineInput(str(number), ids, SamplingParams(max_new_tokens=NEW)))
        found[str(number)] = []
    while not core.idle:
        for delta in core.step():
            assert delta.finish is None or delta.finish.error is None, delta.finish
            found[delta.id] += delta.tokens
    return list(found.values())


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_every_architecture(arch, tmp_path):
    path = make_tiny(arch, tmp_path / 'model')
    wanted = tokens(path, 1, tmp_path / '1')
    for size in (2, 4):
        assert tokens(path, size, tmp_path / str(size)) == wanted


@pytest.mark.parametrize('name', PLAIN_INPUTS)
def test_every_format_of_weights(name, tmp_path):
    source = make_tiny('LlamaForCausalLM', tmp_path / 'source', hidden_size=64, intermediate_size=96,
                       num_attention_heads=4)  # fmt: skip
    path, _ = write_pair(source, tmp_path / 'model', MODELS[name])
    wanted = tokens(path, 1, tmp_path / '1')
    assert tokens(path, 3, tmp_path / '3') == wanted


@pytest.mark.parametrize('bits', [8, 4])
def test_caches_of_codes(bits, tmp_path):
    path = make_tiny('Qwen2ForCausalLM', tmp_path / 'model')
    wanted = tokens(path, 1, tmp_path / '1', quant_policy=bits)
    assert tokens(path, 2, tmp_path / '2', quant_policy=bits) == wanted
