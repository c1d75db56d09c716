"""``lmdeploy lite auto_awq``: weights in 4 bits, in AutoAWQ's format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_groups(parser)
    parser.add_argument('--w-sym', action='store_true', help='without zero points')
    parser.add_argument('--search-scale', action='store_true', help="AWQ's search, which is the default")
    parser.add_argument('--no-search-scale', action='store_true', help='one fixed smoothing instead of the search')
    parser.add_argument('--no-scale', action='store_true', help='only round')
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    def recipe() -> Recipe:
        from lmdeploy.lite import methods

        return methods.awq(args.w_bits, args.w_group_size, symmetric=args.w_sym, effort=args.effort,
                           search=not args.no_search_scale, smooth=not args.no_scale)  # fmt: skip

    what = f'int{args.w_bits} g{args.w_group_size}{" symmetric" if args.w_sym else ""}'
    return shared.quantise(args, screen, what, recipe)
