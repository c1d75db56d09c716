"""``lmdeploy lite auto_gptq``: weights in 2, 3, 4 or 8 bits, by GPTQ."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen
from lmdeploy.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe

BITS = (2, 3, 4, 8)
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
    if args.w_bits not in BITS or (args.format == 'awq' and args.w_bits != 4):
        reason = f'possible are {", ".join(map(str, BITS))}, and 4 in the format awq'
        raise ConfigError('LMD-610', option='--w-bits', value=args.w_bits, reason=reason)

    def recipe() -> Recipe:
        from lmdeploy.config.quantization import AWQ, PACK, Storage
        from lmdeploy.config.quantization import GPTQ as FORMAT
        from lmdeploy.lite.rotated import GPTQ

        form = {'awq': AWQ, 'compressed-tensors': PACK}.get(args.format, FORMAT)
        storage = Storage(form, bits=args.w_bits, group=max(args.w_group_size, 0),
                          symmetric=not args.w_asym and args.format != 'awq',
                          zero_shift=int(args.format == 'gptq'))  # fmt: skip
        return GPTQ(storage, args.rotation, args.effort)

    what = f'int{args.w_bits} g{args.w_group_size}, {args.format}'
    return shared.quantise(args, screen, what, recipe)
