"""``lmdeploy lite calibrate``: statistics of all inputs of linear layers, and nothing else."""

from __future__ import annotations

import argparse

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument('--search-scale', action='store_true',
                        help='add the scales that auto_awq would choose for 4 bits in groups of 128')
    shared.add_calibration(parser)
    shared.add_work(parser, effort=False)


def run(args: argparse.Namespace, screen: Screen) -> int:
    screen.note('lite plan', method=args.method, model=args.model, what='statistics only', folder=args.work_dir)
    files = shared.find(args)
    from lmdeploy.cli.lite_progress import Progress, tell_calibration
    from lmdeploy.config.quantization import AWQ, Storage
    from lmdeploy.lite.job import open_calibration
    from lmdeploy.lite.observe import observe

    options = shared.options(args)
    source, calibration, reduced, device = open_calibration(files.path, options)
    with source.checkpoint:
        tell_calibration(screen, calibration, reduced)
        width = source.config.hidden_size
        group = next(size for size in (128, 64, 32, 16, 0) if not size or not any(
            wide % size for wide in (width, source.config.intermediate_size)))  # fmt: skip
        search = Storage(AWQ, bits=4, group=group, symmetric=False) if args.search_scale else None
        with Progress(screen, source.num_layers) as progress:
            path = observe(source, calibration, options.work_dir, device, options.batch_size, search, progress)
    print(path)
    return 0
