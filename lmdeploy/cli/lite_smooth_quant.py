"""``lmdeploy lite smooth_quant``: weights and inputs in 8 bits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe

DTYPES = ('int8', 'fp8', 'float8_e4m3fn', 'float8_e5m2')
FORMATS = ('smooth_quant', 'compressed-tensors')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument('--quant-dtype', choices=DTYPES, default='int8', help='default: %(default)s')
    parser.add_argument('--format', choices=FORMATS, default='smooth_quant',
                        help='smooth_quant is read by LMDeploy, compressed-tensors by vLLM, SGLang and us '
                             '(default: %(default)s)')
    parser.add_argument('--search-scale', action='store_true',
                        help='search scales in float8, too, where they hardly matter; int8 always does')
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    def recipe() -> Recipe:
        from lmdeploy.lite import methods

        return methods.smooth_quant(args.quant_dtype, form=args.format, search=args.search_scale, effort=args.effort)

    return shared.quantise(args, screen, f'{args.quant_dtype} weights and inputs', recipe)
