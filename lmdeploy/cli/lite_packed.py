"""``lmdeploy lite w4a8``, ``w3`` and ``w2``: few bits, by GPTQ, with Hadamard transforms while the model runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe

WORDS = {'w4a8': 'int4 with inputs in int8', 'w3': 'int3', 'w2': 'int2'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument('--w-group-size', type=int, default=None, metavar='N',
                        help='input channels that share a scale (default: 128; of w2 64)')
    shared.add_rotation(parser)
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    if args.method == 'w2':
        screen.note('lite two bits')

    def recipe() -> Recipe:
        from lmdeploy.lite import methods

        return methods.packed(args.method, args.w_group_size, rotation=args.rotation, effort=args.effort)

    group = '' if args.w_group_size is None else f' g{args.w_group_size}'
    return shared.quantise(args, screen, f'{WORDS[args.method]}{group}, {args.rotation}', recipe)
