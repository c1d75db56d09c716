"""Scripts as users write them: several ranks, no main guard, one answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.toy import write_model

SCRIPT = """
from lmdeploy import pipeline, TurbomindEngineConfig
from lmdeploy import pipeline, PytorchEngineConfig
pipe = pipeline(PATH,
backend_config=NAME(
tp=2,
max_batch_size=32,
enable_prefix_caching=True,
cache_max_entry_count=0.8,
session_len=8192,
))
response = pipe(['Hi, pls intro yourself', 'Shanghai is'])
print([one.token_ids for one in response])
"""


def test_two_devices_in_a_plain_script(tmp_path):
    path = write_model(tmp_path / 'model', max_position_embeddings=16384)
    answers = []
    for name, ranks in (('TurbomindEngineConfig', 1), ('TurbomindEngineConfig', 2), ('PytorchEngineConfig', 2)):
        # in float32 the order of sums does not decide between two tokens
        text = SCRIPT.replace('tp=2', f"dtype='float32', tp={ranks}").replace('NAME', name)
        script = tmp_path / 'script.py'
        script.write_text(text.replace('PATH', repr(str(path))))
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300,
                              cwd=Path(__file__).parents[2], check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0].startswith('[[') and answers == answers[:1] * 3
