"""``lmdeploy bench kernels``: every kernel of this device beside its bound."""

from __future__ import annotations

import argparse

from lmdeploy.bench.shapes import QUANTISED
from lmdeploy.cli import bench_args as shared
from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser, optional='shapes:qwen2.5-0.5b')
    parser.add_argument('--rows', type=shared.at_least(1), nargs='+', default=[1, 16], metavar='N',
                        help='tokens of a step (default: 1 16)')
    parser.add_argument('--context', type=shared.at_least(1), default=1024, metavar='N',
                        help='cached tokens of each row, and the length of the prompt (default: %(default)s)')
    parser.add_argument('--only', default='', metavar='TEXT', help='kernels whose name contains this')
    parser.add_argument('--dtype', default='auto', help='auto, float32, bfloat16 or float16')
    parser.add_argument('--device', choices=('auto', 'cuda', 'cpu'), default='auto', help='default: %(default)s')
    parser.add_argument('--quant', choices=tuple(QUANTISED), nargs='+', default=[], metavar='NAME',
                        help=f'multiply with weights of these formats, too: {", ".join(QUANTISED)}')
    shared.add_output(parser)
    shared.add_roof(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.bench.kernels import measure
    from lmdeploy.bench.report import Table, shown
    from lmdeploy.config.options import DTYPES
    from lmdeploy.runner.model_runner import choose_device, choose_dtype

    roof = shared.given_roof(args)
    device = choose_device(args.device)
    config = shared.model_config(args.model)
    dtype = choose_dtype(DTYPES.get(args.dtype, args.dtype), device, config.dtype_name)
    report = measure(config, args.model, device, dtype, args.rows, args.context, args.only, roof,
                     args.quant)
    shared.write(args, screen, report)
    table = Table(('kernel', 'shape', 'implementation', 'us', 'GB/s', 'TFLOP/s', 'bound us', 'by', 'of bound'),
                  names=3)
    for figure in report.figures:
        table.add(figure.name, figure.shape, figure.implementation, shown(figure.microseconds),
                  shown(figure.gb_per_s), shown(figure.tflops) if figure.tflops else '', shown(figure.bound_us),
                  figure.bound_by, f'{figure.ratio:.1%}')
    print(f'{report.model}, {report.dtype} on {report.device.name}')
    table.print()
    shared.tell_roof(screen, report.roof)
    return 0
