"""``lmdeploy lite auto``: 2, 3, 4 or 8 bits for each part of a layer, by its sensitivity and a limit of size."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen
from lmdeploy.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe

UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KIB': 1 << 10, 'MIB': 1 << 20, 'GIB': 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument('--bits', type=float, metavar='N',
                       help='mean bits of a quantised weight, scales and zero points included, such as 4.2')
    limit.add_argument('--budget', metavar='SIZE', help='size of the whole model, such as 4.2GB or 900MiB')
    parser.add_argument('--w-group-size', type=int, default=128, metavar='N',
                        help='input channels that share a scale; of 2 bits at most 64 (default: %(default)s)')
    shared.add_rotation(parser)
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    budget = None if args.budget is None else size_of(args.budget)
    what = f'{args.bits:g} bits' if args.budget is None else args.budget

    def recipe() -> Recipe:
        from lmdeploy.cli.lite_progress import Progress
        from lmdeploy.lite.hidden import Hidden
        from lmdeploy.lite.job import compute_type, open_calibration
        from lmdeploy.lite.sensitivity import mixed

        options = shared.options(args)
        source, calibration, _, device = open_calibration(shared.find(args).path, options)
        with source.checkpoint, Progress(screen, source.num_layers) as progress:
            stream = Hidden(calibration.sequences, source.config.hidden_size, options.batch_size, device,
                            options.work_dir.parent / f'.{options.work_dir.name}-survey.bin',
                            compute_type(source, device))  # fmt: skip
            return mixed(source, stream, device, bits=args.bits, budget=budget, group=args.w_group_size,
                         rotation=args.rotation, effort=args.effort, watch=progress)  # fmt: skip

    return shared.quantise(args, screen, f'{what}, {args.rotation}', recipe)


def size_of(text: str) -> int:
    """Bytes of ``'4.2GB'``.

    Raises:
        ConfigError: LMD-610: it is no size.
    """
    found = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([KMG]I?B)?', text.strip().upper())
    if found is None:
        raise ConfigError('LMD-610', option='--budget', value=text, reason='it is no size such as 4.2GB')
    return int(float(found[1]) * UNITS[found[2] or ''])
