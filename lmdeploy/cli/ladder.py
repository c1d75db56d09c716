"""The models that have a short name, from small to large: choosing one, and saying plainly what it is."""

from __future__ import annotations

import sys
from pathlib import Path

from lmdeploy.cli.screen import Screen
from lmdeploy.hub import catalog
from lmdeploy.hub.store import megabytes


def rungs() -> list[catalog.CatalogEntry]:
    """The models that can chat, smallest first."""
    return sorted((entry for entry in catalog.entries() if entry.task == 'chat'), key=lambda entry: entry.bytes)


def ask(screen: Screen) -> str:
    """Show the ladder and read a choice: a number, or what may name a model; EOF and an empty line take the first."""
    entries = rungs()
    here = catalog.installed()
    screen.note('ladder')
    for number, entry in enumerate(entries, 1):
        marks = [screen.text('ladder_demo')] if entry.demo else []
        marks += [screen.text('ladder_installed')] if entry in here else []
        print(f'  {number}  {entry.alias:20}{megabytes(entry.bytes):>9}  {", ".join(entry.languages):8}'
              f'{entry.licence:12}{", ".join(marks)}'.rstrip(), file=sys.stderr)
    while True:
        print(screen.text('ladder_ask'), end=' ', file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return entries[0].alias
        if line.isdecimal():
            if 1 <= int(line) <= len(entries):
                return entries[int(line) - 1].alias
        elif _may_name_a_model(line):
            return line
        screen.note('ladder_again', last=len(entries))


def _may_name_a_model(text: str) -> bool:
    """Whether ``text`` is more than a stray word: a path or hub id, a file that exists, or a short name."""
    return any(mark in text for mark in '/\\:') or Path(text).exists() or catalog.find(text) is not None


def announce(model: str, screen: Screen) -> None:
    """For a model of the catalog: its licence before a download, and whether it is of demo size."""
    entry = catalog.find(model)
    if entry is None:
        return
    if not catalog.installed_size(entry):
        screen.note('download', alias=entry.alias, size=megabytes(entry.download_bytes), licence=entry.licence)
    better = catalog.find(entry.upgrade) if entry.upgrade else None
    if entry.demo and better is not None:
        screen.note('demo', alias=entry.alias, better=better.alias, size=megabytes(better.download_bytes))
