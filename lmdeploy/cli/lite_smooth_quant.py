"""``lmdeploy lite smooth_quant``: weights and inputs in 8 bits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.lite.recipe import Recipe

DTYPES = {'int8': 'int8', 'fp8': 'float8_e4m3fn', 'float8_e4m3fn': 'float8_e4m3fn', 'float8_e5m2': 'float8_e5m2'}
FORMATS = ('smooth_quant', 'compressed-tensors')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument('--quant-dtype', choices=tuple(DTYPES), default='int8', help='default: %(default)s')
    parser.add_argument('--format', choices=FORMATS, default='smooth_quant',
                        help='smooth_quant is read by LMDeploy, compressed-tensors by vLLM, SGLang and us '
                             '(default: %(default)s)')
    parser.add_argument('--search-scale', action='store_true',
                        help='search scales in float8, too, where they hardly matter; int8 always does')
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    kind = DTYPES[args.quant_dtype]

    def recipe() -> Recipe:
        from lmdeploy.config.quantization import FLOAT, INT, SMOOTH, Storage
        from lmdeploy.lite.smooth import SmoothQuant

        form = SMOOTH if args.format == 'smooth_quant' else INT if kind == 'int8' else FLOAT
        storage = Storage(form, 'int' if kind == 'int8' else kind, activation=kind)
        return SmoothQuant(storage, args.effort, kind == 'int8' or args.search_scale)

    return shared.quantise(args, screen, f'{kind} weights and inputs', recipe)
