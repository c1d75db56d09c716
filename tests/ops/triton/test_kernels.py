"""Runs the ``check_*.py`` beside it, each in a process of its own: by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted(Path(__file__).parent.glob('check_*.py'))
WAYS = ['interpreter', pytest.param('gpu', marks=pytest.mark.gpu)]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('check', CHECKS, ids=lambda path: path.stem)
def test_kernels(check, way):
    """An out-of-bounds access under the interpreter ends the process, so it must not be ours."""
    pytest.importorskip('triton', reason='triton is made for Linux on x86-64')
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    if way == 'interpreter':
        environment |= {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '--tb=short', str(check)],
        env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
