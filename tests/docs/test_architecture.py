"""The tree of docs/architecture.md is the tree of the package."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.docs.pages import ROOT, blocks

PACKAGE = ROOT / 'lmdeploy'


def tree() -> str:
    """The part of the tree below ``lmdeploy/``: folders and files at two spaces, a folder's files deeper."""
    text = next(b.text for b in blocks(ROOT / 'docs' / 'architecture.md') if b.text.startswith('lmdeploy/\n'))
    return text.partition('\n')[2].partition('\ntests/')[0]


def files() -> Iterator[str]:
    """The files that the tree names, as paths below the package; ``a/{b,c}.py`` is two."""
    folder = ''
    for line in tree().splitlines():
        top = not line.startswith('   ')
        if top:
            folder = ''.join(re.findall(r'^  (\w+/)(?:\s|$)', line))
        for name in re.findall(r'[\w/]*\{[\w,]+\}\.py|[\w/]+\.py', line):
            before, _, rest = name.partition('{')
            names = [name] if not rest else [f'{before}{n}.py' for n in rest.removesuffix('}.py').split(',')]
            yield from (folder + n for n in names)


def test_every_file_that_the_tree_names_exists():
    named = list(files())
    assert len(named) > 80
    assert [name for name in named if not (PACKAGE / name).is_file()] == []


def test_every_folder_is_in_the_tree():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob('*.py'))}
    assert {name for name in folders if not re.search(rf'^  {name}/', tree(), re.MULTILINE)} == set()
