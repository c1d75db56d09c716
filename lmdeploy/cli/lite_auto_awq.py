"""``lmdeploy lite auto_awq``: weights in 4 bits, in AutoAWQ's format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen
from lmdeploy.errors import ConfigError

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
    if args.w_bits != 4:
        reason = 'the format of AWQ holds 4 bits; lite w2 and lite w3 have fewer, lite auto_gptq 8'
        raise ConfigError('LMD-610', option='--w-bits', value=args.w_bits, reason=reason)

    def recipe() -> Recipe:
        from lmdeploy.config.quantization import AWQ as FORMAT
        from lmdeploy.config.quantization import Storage
        from lmdeploy.lite.awq import AWQ

        storage = Storage(FORMAT, bits=4, group=max(args.w_group_size, 0), symmetric=args.w_sym)
        return AWQ(storage, args.effort, not args.no_search_scale, not args.no_scale)

    what = f'int4 g{args.w_group_size}{" symmetric" if args.w_sym else ""}'
    return shared.quantise(args, screen, what, recipe)
