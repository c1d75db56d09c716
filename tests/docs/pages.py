"""Reading and running the documentation: its pages and their code blocks."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
RUN = '<!-- run -->\n'


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, the line of the page on which the text starts, and the run mark."""

    language: str
    text: str
    line: int
    marked: bool


def pages(folder: str = '') -> list[Path]:
    """Markdown files below ``docs/<folder>``, and with no folder those of the repository's top as well."""
    top = [] if folder else sorted(ROOT.glob('*.md'))
    return top + sorted((ROOT / 'docs' / folder).rglob('*.md'))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding='utf-8')
    return [Block(match[1], match[2], text[:match.start(2)].count('\n') + 1, text[:match.start()].endswith(RUN))
            for match in FENCE.finditer(text)]


def script(page: Path, language: str = 'python') -> str:
    """The page's blocks as one program whose line numbers are those of the page."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == language and (language == 'python' or block.marked):
            lines += [''] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return '\n'.join(lines) + '\n' if lines else ''


def name(page: Path) -> str:
    """The page as a test's id."""
    return str(page.relative_to(ROOT))


def run(command: list[str], folder: Path) -> str:
    """What a program prints that runs in a folder of its own, with this checkout's package; it has to succeed."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'LMDEPLOY_LANG': 'en', 'PYTHONIOENCODING': 'utf-8'}
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
                         env=environment)
    assert out.returncode == 0, f'{out.stdout}\n{out.stderr}'
    return out.stdout


ENGLISH = [page for page in pages() if 'zh' not in name(page)]
