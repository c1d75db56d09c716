"""Several ranks as processes: they answer as one does, and fail together, at once, with the cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import ConfigError, EngineDead, LoadError
from lmdeploy.executor.choice import make_executor
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.executor.process import ProcessExecutor
from tests.models.tiny import VOCAB, make_tiny

WITHIN = 5.0  # seconds: what a failure may take to be noticed


def options(**changes) -> EngineConfig:
    return EngineConfig(**({'device': 'cpu', 'dtype': 'float32', 'num_blocks': 64, 'max_batch_size': 8} | changes))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_tiny('Qwen2ForCausalLM', tmp_path_factory.mktemp('ranks') / 'model')


def requests() -> list[EngineInput]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (5, 70, 1, 33)]
    return [
        EngineInput('greedy', prompts[0], SamplingParams(max_new_tokens=12)),
        EngineInput('long', prompts[1], SamplingParams(max_new_tokens=12, repetition_penalty=1.3, logprobs=2)),
        EngineInput('drawn', prompts[2], SamplingParams(max_new_tokens=12, greedy=False, temperature=1.5, seed=9)),
        EngineInput('processed', prompts[3], SamplingParams(
            max_new_tokens=6, logits_processors=(lambda ids, row: torch.roll(row, 1 + len(ids) % 3),))),
        EngineInput('raises', prompts[0], SamplingParams(
            max_new_tokens=6, logits_processors=(lambda ids, row: 1 / 0,))),
    ]  # fmt: skip


def answers(core: EngineCore) -> dict[str, tuple[list[int], str]]:
    """Tokens and how they end, by request."""
    found: dict[str, tuple[list[int], str]] = {}
    for request in requests():
        core.submit(request)
        found[request.id] = [], ''
    while not core.idle:
        for delta in core.step():
            tokens, _ = found[delta.id]
            error = delta.finish.error if delta.finish else None
            found[delta.id] = tokens + list(delta.tokens), f'{delta.finish.reason} {error}' if delta.finish else ''
    core.check()
    return found


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_ranks_answer_as_one_does_and_leave_nothing(folder):
    alone = LocalExecutor(options(), folder)
    wanted = answers(EngineCore(alone, alone.start()))
    assert 'ZeroDivisionError' in wanted['raises'][1]
    executor = make_executor(options(tp=3), folder)
    capacity = executor.start()
    try:
        assert capacity.choices['tp'] == '3' and executor.dtype is torch.float32
        pids = [worker._process.pid for worker in executor._workers]
        assert answers(EngineCore(executor, capacity)) == wanted
        assert executor.call('choices')[0]['runner'] == 'eager' and len(executor.call('choices')) == 3
    finally:
        executor.stop()
        executor.stop()
    assert len(pids) == 2 and not any(map(alive, pids))


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_ends_or_hangs_is_the_end_of_all_within_seconds(folder, number):
    executor = ProcessExecutor(options(tp=2), folder)
    core = EngineCore(executor, executor.start())
    try:
        pid = executor._workers[0]._process.pid
        core.submit(EngineInput('a', [5, 6, 7], SamplingParams(max_new_tokens=4000)))
        core.submit(EngineInput('b', [5, 6], SamplingParams(max_new_tokens=4000)))
        for _ in range(5):
            core.step()
        os.kill(pid, number)
        begin, ends = time.monotonic(), []
        while not core.idle:
            ends += [delta.finish.error for delta in core.step() if delta.finish]
        assert time.monotonic() - begin < WITHIN
        assert len(ends) == 2 and all(isinstance(error, EngineDead) and error.code == 'LMD-362' for error in ends)
        cause = 'signal 9' if number == signal.SIGKILL else 'has not been heard for 4 s'
        assert cause in str(ends[0]) and 'rank 1' in str(ends[0])
        with pytest.raises(EngineDead, match='rank 1'):
            executor.call('choices')
    finally:
        executor.stop()
    assert not alive(pid)


def test_a_rank_that_fails_in_a_step_tells_its_traceback(folder):
    executor = ProcessExecutor(options(tp=2), folder)
    executor.start()
    try:
        executor._workers[0].channel.send('plan', 'no plan')
        with pytest.raises(EngineDead, match=r"Traceback[\s\S]*AttributeError: 'str' object"):
            for _ in range(500):
                executor._check()
                time.sleep(0.01)
    finally:
        executor.stop()


def test_what_is_wrong_with_the_model_is_said_as_by_one_rank(folder, tmp_path):
    broken = make_tiny('Qwen2ForCausalLM', tmp_path / 'broken')
    file = next(broken.glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadError) as alone:
        LocalExecutor(options(), broken).start()
    executor = ProcessExecutor(options(tp=2), broken)
    with pytest.raises(LoadError) as together:
        executor.start()
    assert together.value.code == alone.value.code
    with pytest.raises(ConfigError, match='needs one for each device'):
        make_executor(options(tp=2, executor='local'), folder)


@pytest.mark.skipif(sys.platform != 'linux', reason='the kernel ends children on Linux')
def test_ranks_die_with_their_parent(folder):
    """A script without a main guard, killed while its ranks wait."""
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from lmdeploy.config.engine import EngineConfig
        from lmdeploy.executor.process import ProcessExecutor
        executor = ProcessExecutor(EngineConfig(device='cpu', dtype='float32', num_blocks=64, tp=2), Path(sys.argv[1]))
        executor.start()
        print(executor._workers[0]._process.pid, flush=True)
        time.sleep(600)
    """)
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, '-c', script, str(folder)], stdout=subprocess.PIPE, cwd=root) as process:
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    deadline = time.monotonic() + WITHIN
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)
