"""The marked shell blocks of the documentation run, and the examples do."""

from __future__ import annotations

import sys

import pytest

from tests.docs.pages import ENGLISH, ROOT, name, run, script


@pytest.mark.real
@pytest.mark.parametrize('page', [page for page in ENGLISH if script(page, 'sh')], ids=name)
def test_marked_shell_blocks_run(page, tmp_path, smollm2):
    program = f'set -euo pipefail\nlmdeploy() {{ "{sys.executable}" -m lmdeploy "$@"; }}\n{script(page, "sh")}'
    assert run(['bash', '-c', program], tmp_path).strip()


@pytest.mark.real
@pytest.mark.parametrize('example', sorted((ROOT / 'examples').glob('*.py')), ids=lambda path: path.stem)
def test_examples_run(example, tmp_path, smollm2):
    assert run([sys.executable, str(example)], tmp_path).strip()
