"""The Python of the documentation runs; links lead somewhere; translations agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ENGLISH, ROOT, blocks, name, pages, run, script

LINK = re.compile(r'\]\(([^)#:]+)(#[^)]*)?\)')


@pytest.mark.real
@pytest.mark.parametrize('page', [page for page in ENGLISH if script(page)], ids=name)
def test_python_blocks_run(page, tmp_path, smollm2):
    file = tmp_path / f'{page.stem}.py'
    file.write_text(script(page), encoding='utf-8')
    run([sys.executable, str(file)], tmp_path)


@pytest.mark.parametrize('page', [page for page in pages() if page not in ENGLISH], ids=name)
def test_python_blocks_of_translations_are_the_same_code(page):
    original = ROOT / 'README.md' if page.name == 'README_zh-CN.md' else ROOT / 'docs' / 'en' / page.name
    assert [_skeleton(block.text) for block in blocks(page) if block.language == 'python'] == \
        [_skeleton(block.text) for block in blocks(original) if block.language == 'python']


def _skeleton(code: str) -> str:
    """The code without its texts, which are translated."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ''
    return ast.dump(tree)


def test_both_languages_have_the_same_pages():
    assert {page.name for page in pages('en')} == {page.name for page in pages('zh_cn')}


@pytest.mark.parametrize('page', pages(), ids=name)
def test_links_lead_to_files(page):
    for target, _ in LINK.findall(page.read_text(encoding='utf-8')):
        assert (page.parent / target).exists(), target


def test_both_readmes_have_the_same_commands():
    first = [block.text for block in blocks(ROOT / 'README.md')][:2]
    assert first == [block.text for block in blocks(ROOT / 'README_zh-CN.md')][:2]


def test_ci_finds_the_commands_of_the_readme():
    program = (ROOT / '.ci' / 'run').read_text(encoding='utf-8')
    function = re.search(r'^readme_command\(\) \{.*?^\}$', program, re.MULTILINE | re.DOTALL)
    for marker, block in zip(('main-command', 'test-command'), blocks(ROOT / 'README.md')):
        out = subprocess.run(['bash', '-c', f'{function[0]}\nreadme_command {marker}'], cwd=ROOT, capture_output=True,
                             text=True, check=True)
        assert out.stdout == block.text
