"""A run that ends at any point, by an exception or by a kill, goes on and gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.lite import workdir
from lmdeploy.lite.job import Job
from lmdeploy.lite.workdir import WorkDir
from tests.lite.runs import RECIPES, digests, options, run

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ('os.replace', '_sync', '_sync_folder', 'shutil.rmtree')


class Killed(BaseException):
    """Stands for the end of the process: no code of ours catches it."""


class Clock:
    """Lets so many file operations happen and ends the run at the next one, before or after it is done."""

    def __init__(self, monkeypatch, left: int, after: bool) -> None:
        self.left, self.after, self.count = left, after, 0
        for name in OPERATIONS:
            module, _, attribute = name.rpartition('.')
            owner = getattr(workdir, module) if module else workdir
            monkeypatch.setattr(owner, attribute, self.watched(getattr(owner, attribute)))

    def watched(self, operation):
        def operate(*args, **kwargs):
            self.count += 1
            if self.count > self.left and not self.after:
                raise Killed
            result = operation(*args, **kwargs)
            if self.count > self.left:
                raise Killed
            return result

        return operate


@pytest.fixture(scope='module')
def once(toy, text, tmp_path_factory):
    """The files of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp('once') / 'out'
    run(toy, RECIPES['awq smoothing'](), options(folder, text))
    return digests(folder)


def test_ended_at_any_file_operation(toy, text, tmp_path, once):
    total, point = None, 0
    while total is None or point < total:
        for after in (False, True):
            out = tmp_path / f'{point} {after}'
            with pytest.MonkeyPatch.context() as patch:
                clock = Clock(patch, point, after)
                ended = True
                try:
                    run(toy, RECIPES['awq smoothing'](), options(out, text))
                    ended = False
                except Killed:
                    pass
                if not ended:
                    total = clock.count
                    break
            assert not (out / 'config.json').exists() or json.loads((out / 'config.json').read_text())
            if not WorkDir.finished(out, key_of(toy, text, out)):
                run(toy, RECIPES['awq smoothing'](), options(out, text))
            assert digests(out) == once, (point, after)
            assert not (out / '.lite' / 'manifest.json').exists()
        point += 4 if point > 7 else 1  # all of the first writes, then some of the others
    assert point > 30


def key_of(toy, text, out):
    job = Job.open(toy, RECIPES['awq smoothing'](), options(out, text))
    job.close()
    return job.key


def test_killed_for_real(toy, text, tmp_path, once):
    out = tmp_path / 'out'
    program = ('import sys; from pathlib import Path; from tests.lite.runs import RECIPES, options, run; import time;'
               'run(Path(sys.argv[1]), RECIPES["awq smoothing"](), options(Path(sys.argv[3]), Path(sys.argv[2])),'
               'lambda event: time.sleep(0.2 if event.layer == 1 else 0))')  # fmt: skip
    process = subprocess.Popen([sys.executable, '-c', program, str(toy), str(text), str(out)], cwd=ROOT)
    manifest, deadline = out / '.lite' / 'manifest.json', time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if manifest.exists() and len(json.loads(manifest.read_text())['shards']) >= 2:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    events = []
    run(toy, RECIPES['awq smoothing'](), options(out, text), events.append)
    assert any(event.what == 'resume' for event in events)
    assert digests(out) == once


def test_a_damaged_shard_is_made_again(toy, text, tmp_path, once):
    out = tmp_path / 'out'
    job = Job.open(toy, RECIPES['awq smoothing'](), options(out, text))
    with pytest.raises(Killed):
        job.run(stop_at('fit', 1))
    job.close()
    shard = out / 'model-00002-of-00003.safetensors'
    shard.write_bytes(shard.read_bytes()[:-1] + b'\0')
    run(toy, RECIPES['awq smoothing'](), options(out, text))
    assert digests(out) == once


def stop_at(what, layer):
    def watch(event):
        if event.what == what and event.layer == layer:
            raise Killed

    return watch


def test_folders_of_others_are_left_alone(toy, text, tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(ConfigError, match='LMD-603'):
        run(toy, RECIPES['rounding'](), options(tmp_path, text))
    with pytest.raises(ConfigError, match='LMD-603'):
        run(toy, RECIPES['rounding'](), options(tmp_path, text, restart=True))
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_another_run_in_the_folder(toy, text, tmp_path):
    out = tmp_path / 'out'
    run(toy, RECIPES['rounding'](), options(out, text))
    with pytest.raises(ConfigError, match='LMD-604'):
        run(toy, RECIPES['awq'](), options(out, text))
    (out / 'notes.txt').write_text('mine')
    run(toy, RECIPES['int8'](), options(out, text, restart=True))
    assert json.loads((out / 'config.json').read_text())['quantization_config']['quant_method'] == 'smooth_quant'
    assert (out / 'notes.txt').read_text() == 'mine'


def test_a_folder_that_cannot_be_made(toy, text, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='LMD-605'):
        run(toy, RECIPES['rounding'](), options(tmp_path / 'file' / 'out', text))
