"""``lmdeploy lite w4a8``, ``w3`` and ``w2``: few bits, by GPTQ, with Hadamard transforms while the model runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe

BITS = {'w4a8': 4, 'w3': 3, 'w2': 2}
GROUPS = {'w4a8': 128, 'w3': 128, 'w2': 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument('--w-group-size', type=int, default=None, metavar='N',
                        help='input channels that share a scale (default: 128; of w2 64)')
    parser.add_argument('--rotation', choices=('none', 'portable', 'native'), default='native',
                        help='native: Hadamard transforms of inputs while the model runs, the most exact; portable: '
                             'folded into the weights (default: %(default)s)')
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    bits, group = BITS[args.method], args.w_group_size or GROUPS[args.method]
    if args.method == 'w2':
        screen.note('lite two bits')

    def recipe() -> Recipe:
        from lmdeploy.config.quantization import PACK, Storage
        from lmdeploy.lite.rotated import GPTQ

        eight = args.method == 'w4a8'
        storage = Storage(PACK, bits=bits, group=max(group, 0), symmetric=eight, activation='int8' if eight else '')
        return GPTQ(storage, args.rotation, args.effort, name=args.method)

    what = f'int{bits} g{group}{" with inputs in int8" if args.method == "w4a8" else ""}, {args.rotation}'
    return shared.quantise(args, screen, what, recipe)
