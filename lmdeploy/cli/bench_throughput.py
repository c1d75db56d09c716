"""``lmdeploy bench throughput``: many requests through the engine, as fast as it goes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmdeploy.cli import bench_args as shared
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.bench.breakdown import Breakdown

MOST_NAME = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_lengths(parser, requests=16, input_len=128, output_len=128)
    parser.add_argument('--concurrency', type=shared.at_least(1), default=None, metavar='N',
                        help='requests at a time (default: all are there from the start)')
    parser.add_argument('--breakdown', action='store_true',
                        help='after the rounds, show where the time of a step goes: graphs, host, kernels')
    shared.add_rounds(parser)
    shared.add_output(parser)
    shared.add_roof(parser)
    shared.add_engine(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    load = shared.workload(args)
    report = shared.measure(args, screen, [load], lambda bench, roof: bench.throughput(
        load, rounds=args.rounds, seed=args.seed, concurrency=args.concurrency, roof=roof,
        inside=args.breakdown))

    from lmdeploy.bench.report import Table, shown

    table = Table(('round', 'output tok/s', 'total tok/s', 'req/s', 'seconds', 'steps', 'TTFT p50 ms', 'TPOT p50 ms',
                   'of roofline'))
    for i, one in enumerate(report.rounds):
        name = 'median' if one is report.median else str(i + 1)
        table.add(name, shown(one.output_tokens_per_second), shown(one.total_tokens_per_second),
                  shown(one.requests_per_second), shown(one.seconds), str(one.steps),
                  shown(one.first_token.p50) if one.first_token else '-',
                  shown(one.per_token.p50) if one.per_token else '-', f'{report.bound.seconds / one.seconds:.1%}')
    print(f'{report.model}, {report.workload}, {report.concurrency} at a time, {report.dtype} on {report.device.name}')
    table.print()
    if report.breakdown is not None:
        tell_breakdown(report.breakdown, report.device.kind != 'cpu')
    shared.tell_roof(screen, report.roof)
    return 0


def tell_breakdown(found: Breakdown, on_gpu: bool) -> None:
    """The parts of a step, as tables. A CPU computes inside the host's time, which says nothing then."""
    from lmdeploy.bench.report import Table, shown

    parts = Table(('step', 'ms'))
    parts.add('in all', shown(found.step_ms))
    if on_gpu:
        parts.add('host', shown(found.host_ms))
        parts.add('graphs on the device', shown(found.graph_ms))
    parts.print()
    if found.graphs:
        graphs = Table(('graph of rows', 'runs', 'ms'))
        for graph in found.graphs:
            graphs.add(str(graph.rows), str(graph.count), shown(graph.median_ms))
        graphs.print()
    kernels = Table(('kernel in a decode step', 'us', 'times'))
    for kernel in found.kernels:
        kernels.add(kernel.name[:MOST_NAME], shown(kernel.us_per_step), shown(kernel.count_per_step))
    kernels.print()
