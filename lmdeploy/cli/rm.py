"""``lmdeploy rm``: delete a downloaded model."""

from __future__ import annotations

import argparse

from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', metavar='MODEL', help='what was given to lmdeploy pull or lmdeploy chat')


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.hub import catalog
    from lmdeploy.hub.store import megabytes

    freed = catalog.remove(args.model)
    if freed:
        screen.note('removed', alias=args.model, size=megabytes(freed))
    else:
        screen.note('not_installed', alias=args.model)
    return 0 if freed else 1
