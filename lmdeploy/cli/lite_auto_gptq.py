"""``lmdeploy lite auto_gptq``: weights in 2, 3, 4 or 8 bits, by GPTQ."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe

FORMATS = ('gptq', 'gptq_v2', 'awq', 'compressed-tensors')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_groups(parser)
    parser.add_argument('--w-asym', action='store_true',
                        help='with zero points: more exact, but read by fewer programs in the format gptq')
    parser.add_argument('--format', choices=FORMATS, default='gptq',
                        help='of the file; awq always has zero points (default: %(default)s)')
    parser.add_argument('--rotation', choices=('none', 'portable'), default='none',
                        help='portable: rotate the residual stream and the values, folded into the weights: more exact '
                             'and read by the same programs, but a shared embedding is stored twice (default: none)')
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    def recipe() -> Recipe:
        from lmdeploy.lite import methods

        return methods.gptq(args.w_bits, args.w_group_size, symmetric=not args.w_asym, form=args.format,
                            rotation=args.rotation, effort=args.effort)  # fmt: skip

    return shared.quantise(args, screen, f'int{args.w_bits} g{args.w_group_size}, {args.format}', recipe)
