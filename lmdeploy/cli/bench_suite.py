"""``lmdeploy bench suite``: the workloads by which engines are usually compared, one after another."""

from __future__ import annotations

import argparse

from lmdeploy.cli import bench_args as shared
from lmdeploy.cli.screen import Screen

CASES = ('1', '16', '256', 'sharegpt')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    group = parser.add_argument_group('workload')
    group.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES),
                       help='1 x 128/512, 16 x 1000/1000, 256 x 1000/1000, 1000 x ShareGPT-like (default: all)')
    group.add_argument('--scale', type=shared.positive, default=1.0, metavar='X',
                       help='below 1: shorter, and not to be compared (default: 1)')
    group.add_argument('--seed', type=shared.at_least(0), default=0, metavar='N', help='of lengths and tokens')
    shared.add_rounds(parser)
    shared.add_output(parser)
    shared.add_roof(parser)
    shared.add_engine(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.bench.report import Table, shown
    from lmdeploy.bench.suite import suite, workloads

    loads = workloads(args.cases, args.seed, args.scale)
    report = shared.measure(args, screen, list(loads.values()), lambda bench, roof: suite(
        bench, loads, rounds=args.rounds, seed=args.seed, roof=roof))
    table = Table(('case', 'output tok/s', 'req/s', 'TPOT p50 ms', 'TTFT p50 ms', 'seconds', 'of roofline'))
    for one in report.cases:
        median = one.median
        table.add(one.workload, shown(median.output_tokens_per_second), shown(median.requests_per_second),
                  shown(median.per_token.p50) if median.per_token else '-',
                  shown(median.first_token.p50) if median.first_token else '-', shown(median.seconds),
                  f'{one.bound.ratio:.1%}')
    first = report.cases[0]
    print(f'{first.model}, {first.dtype} on {first.device.name}, started in {first.start_seconds:.1f} s')
    table.print()
    shared.tell_roof(screen, first.roof)
    return 0
