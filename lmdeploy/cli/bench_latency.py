"""``lmdeploy bench latency``: one request after another, each alone in the engine."""

from __future__ import annotations

import argparse

from lmdeploy.cli import bench_args as shared
from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_lengths(parser, requests=3, input_len=128, output_len=128)
    shared.add_rounds(parser)
    shared.add_output(parser)
    shared.add_roof(parser)
    shared.add_engine(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    load = shared.workload(args)
    report = shared.measure(args, screen, [load],
                            lambda bench, roof: bench.latency(load, rounds=args.rounds, seed=args.seed, roof=roof))

    from lmdeploy.bench.report import Table, shown

    median, bound = report.median, report.bound
    table = Table(('ms', 'mean', 'p50', 'p90', 'p99', 'roofline', 'of roofline'))
    for name, spread, least, ratio in (
            ('first token', median.first_token, bound.first_token_ms, bound.first_token_ratio),
            ('per output token', median.per_token, bound.per_token_ms, bound.per_token_ratio),
            ('between tokens', median.between_tokens, None, None)):
        if spread is not None:
            table.add(name, shown(spread.mean), shown(spread.p50), shown(spread.p90), shown(spread.p99),
                      '' if least is None else shown(least), '' if ratio is None else f'{ratio:.1%}')
    print(f'{report.model}, {report.workload}, one at a time, {report.dtype} on {report.device.name}')
    table.print()
    shared.tell_roof(screen, report.roof)
    return 0
