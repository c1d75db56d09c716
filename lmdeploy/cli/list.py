"""``lmdeploy list``: the models that have a short name, or the chat templates."""

from __future__ import annotations

import argparse

from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--templates', action='store_true', help='list the names that --chat-template takes')


def run(args: argparse.Namespace, screen: Screen) -> int:
    if args.templates:
        _templates(screen)
    else:
        _models(screen)
    return 0


def _templates(screen: Screen) -> None:
    from lmdeploy.model import MODELS

    print(screen.text('templates'))
    print('\n'.join(sorted(MODELS.module_dict)))


def _models(screen: Screen) -> None:
    from lmdeploy.hub import catalog
    from lmdeploy.hub.store import megabytes

    rows = [('NAME', 'SIZE', 'DOWNLOADED', 'USE', 'LANGUAGES', 'LICENCE', 'MODEL')]
    for entry in catalog.entries():
        rows.append((entry.alias, megabytes(entry.bytes), 'yes' if catalog.installed_size(entry) else '-',
                     f'{entry.task}, demo size' if entry.demo else entry.task, ','.join(entry.languages),
                     entry.licence, entry.title))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    screen.note('list_hint')
