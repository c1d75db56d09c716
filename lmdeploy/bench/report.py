"""What a benchmark says: a table on the screen, JSON in a file, and the facts without which neither means anything."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy.version import __version__

PACKAGES = ('torch', 'triton', 'numpy', 'tokenizers')
PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """The mean and some percentiles of times, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """None: there are no times."""
        if not len(seconds):
            return None
        values = 1000 * np.asarray(seconds)
        return cls(float(values.mean()), *(float(np.percentile(values, percent)) for percent in PERCENTS))


@dataclass(slots=True)
class Environment:
    """Which program ran, on what."""

    lmdeploy: str = __version__
    commit: str | None = field(default_factory=lambda: commit())
    python: str = field(default_factory=platform.python_version)
    system: str = field(default_factory=platform.platform)
    packages: dict[str, str] = field(default_factory=lambda: {name: _version(name) for name in PACKAGES})


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return 'not installed'


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with ``-dirty`` after changes; None: it lies in none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return None
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40', '--exclude', '*']
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def write_json(path: Path, report: Any) -> None:
    """Write a dataclass as JSON; raises OSError."""
    path.write_text(json.dumps(asdict(report), indent=2, default=str) + '\n', encoding='utf-8')


@dataclass(slots=True)
class Table:
    """Rows of texts under headings; the first ``names`` columns are left-aligned, the others right-aligned."""

    headings: tuple[str, ...]
    names: int = 1
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def print(self) -> None:
        """With lines and colours on a terminal; as plain columns anywhere else."""
        if sys.stdout.isatty():
            self._print_rich()
            return
        everything = [self.headings, *self.rows]
        widths = [max(len(row[i]) for row in everything) for i in range(len(self.headings))]
        for row in everything:
            cells = (cell.rjust(width) if i >= self.names else cell.ljust(width)
                     for i, (cell, width) in enumerate(zip(row, widths)))
            print('  '.join(cells).rstrip())

    def _print_rich(self) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify='right' if i >= self.names else 'left',
                             min_width=max(map(len, heading.split())))  # narrow screens break headings between words
        for row in self.rows:
            table.add_row(*map(Text, row))
        Console().print(table)


def shown(value: float) -> str:
    """A figure with about four significant digits and marks between thousands."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f'{value:,.{digits}f}'
