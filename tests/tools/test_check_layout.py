"""Each law is enforced: a tree that breaks exactly one gives exactly that finding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_layout import MAX_LINES, WARN_LINES, check

SCRIPT = Path(__file__).resolve().parents[2] / 'tools' / 'check_layout.py'


def tree(root: Path, file: str, source: str) -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    (root / 'lmdeploy').mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize('file, source, words', [
    # direction
    ('lmdeploy/ops/norm.py', 'from lmdeploy.nn.linear import Linear', 'ops may not import lmdeploy.nn.linear'),
    ('lmdeploy/models/llama.py', 'from lmdeploy import engine', 'models may not import lmdeploy.engine'),
    ('lmdeploy/models/llama.py', 'import lmdeploy.executor.base', 'models may not import lmdeploy.executor'),
    ('lmdeploy/engine/a.py', 'from lmdeploy.executor.local import X', 'engine may not import lmdeploy.executor.local'),
    ('lmdeploy/runner/a.py', 'from lmdeploy.engine.core import X', 'runner may not import lmdeploy.engine.core'),
    ('lmdeploy/nn/a.py', 'from lmdeploy.runner.slots import X', 'nn may not import lmdeploy.runner.slots'),
    ('lmdeploy/frontend/a.py', 'def f():\n    from lmdeploy.api import x', 'frontend may not import lmdeploy.api'),
    ('lmdeploy/serve/a.py', 'import lmdeploy.lite', 'serve may not import lmdeploy.lite'),
    ('lmdeploy/config/a.py', 'from lmdeploy.models import X', 'config may not import'),
    ('lmdeploy/log.py', 'from lmdeploy.errors import X', 'log may not import'),
    ('lmdeploy/fresh/a.py', 'from lmdeploy.errors import X', 'fresh has no place in the table'),
    ('lmdeploy/nn/a.py', 'from .b import X', 'relative import'),
    # weight of an import
    ('lmdeploy/engine/a.py', 'import torch', 'imports torch at module level'),
    ('lmdeploy/chat/a.py', 'from torch.nn import Linear', 'imports torch at module level'),
    ('lmdeploy/frontend/a.py', 'try:\n    import torch\nexcept OSError:\n    pass', 'imports torch at module level'),
    ('lmdeploy/cli/a.py', 'class A:\n    import rich', 'imports rich at module level'),
    # one home for each
    ('lmdeploy/ops/a.py', 'def f():\n    import triton', 'imports triton outside ops/triton'),
    ('lmdeploy/runner/a.py', 'from torch import distributed', 'outside executor and parallel'),
    ('lmdeploy/runner/a.py', 'import ray', 'outside executor and parallel'),
    ('lmdeploy/hub/a.py', 'import os\nx = os.environ["A"]', 'only config/env.py reads the environment'),
    ('lmdeploy/config/engine.py', 'import os\nx = os.getenv("A")', 'only config/env.py reads the environment'),
    ('lmdeploy/models/a.py', 'x = "cuda"', "the literal 'cuda'"),
    ('lmdeploy/engine/a.py', 'x = f("cuda:0")', "the literal 'cuda:0'"),
    # code from data
    ('lmdeploy/weights/a.py', 'def f():\n    import pickle', 'imports pickle'),
    ('lmdeploy/weights/a.py', 'from marshal import loads', 'imports marshal'),
    ('lmdeploy/tokenizer/a.py', 'from transformers import AutoTokenizer', 'imports transformers'),
    ('lmdeploy/chat/a.py', 'eval("1")', 'calls eval'),
    ('lmdeploy/chat/a.py', 'exec("1")', 'calls exec'),
    ('lmdeploy/weights/a.py', 'x = torch.load("f")', 'calls torch.load'),
    ('lmdeploy/weights/a.py', 'x = np.load("f", allow_pickle=True)', 'calls np.load'),
    ('lmdeploy/hub/a.py', 'subprocess.run("ls", shell=True)', 'calls subprocess.run'),
    # text
    ('lmdeploy/nn/a.py', 'x = 1  # TODO later', 'leftover: # TODO later'),
    ('tests/test_a.py', '# FIXME\n', 'leftover: # FIXME'),
    ('benchmark/a.py', 'x = 1\n' * (MAX_LINES + 1), 'lines; a file is one idea'),
])
def test_a_broken_law_is_found(tmp_path, file, source, words):
    found = check(tree(tmp_path, file, source))
    assert len(found) == 1 and found[0].error
    assert words in str(found[0])
    assert str(found[0]).startswith(f'{file}:')


@pytest.mark.parametrize('file, source', [
    ('lmdeploy/runner/a.py', 'from lmdeploy.engine.plan import StepPlan\nfrom lmdeploy.engine import sampling'),
    ('lmdeploy/attention/a.py', 'from lmdeploy.runner.batch import ForwardBatch'),
    ('lmdeploy/engine/a.py', 'import numpy\nfrom lmdeploy.executor.base import X\nfrom lmdeploy.errors import Y'),
    ('lmdeploy/engine/a.py', 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch'),
    ('lmdeploy/engine/process.py', 'from lmdeploy.executor.local import X\nfrom lmdeploy.tokenizer import Y'),
    ('lmdeploy/frontend/a.py', 'def f():\n    import torch'),
    ('lmdeploy/ops/triton/a.py', 'import triton'),
    ('lmdeploy/parallel/a.py', 'import torch.distributed'),
    ('lmdeploy/config/env.py', 'import os\nx = os.environ.get("A")'),
    ('lmdeploy/parallel/a.py', 'x = "cuda"'),
    ('lmdeploy/models/a.py', '"""On cuda."""\nx = model.eval()'),
    ('lmdeploy/cli/a.py', 'from lmdeploy.api import pipeline\nfrom lmdeploy.lite import x'),
    ('lmdeploy/nn/a.py', 'x = "TODO"'),
    ('tests/test_a.py', 'import pickle\nimport torch\nx = "cuda"'),
])
def test_what_is_allowed_is_not_found(tmp_path, file, source):
    assert check(tree(tmp_path, file, source)) == []


def test_a_long_file_is_a_warning_first(tmp_path):
    (found,) = check(tree(tmp_path, 'lmdeploy/nn/a.py', 'x = 1\n' * (WARN_LINES + 1)))
    assert not found.error and 'warning' in str(found)


@pytest.mark.parametrize('source, code, last', [
    ('x = 1\n', 0, 'layout: 0 errors, 0 warnings'),
    ('eval("1")\n', 1, 'layout: 1 errors, 0 warnings'),
])
def test_the_script(tmp_path, source, code, last):
    root = tree(tmp_path, 'lmdeploy/nn/a.py', source)
    out = subprocess.run([sys.executable, str(SCRIPT), str(root)], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stdout.splitlines()[-1]) == (code, last)


def test_a_folder_without_the_package_is_wrong_usage(tmp_path):
    out = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert out.returncode == 2
