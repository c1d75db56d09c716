"""``lmdeploy bench serve``: requests that arrive at a running server as a Poisson process."""

from __future__ import annotations

import argparse
import asyncio
import math

from lmdeploy.cli import bench_args as shared
from lmdeploy.cli.screen import Screen
from lmdeploy.config import env


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('url', metavar='URL', help='http://HOST:PORT of a server with /v1/completions')
    parser.add_argument('--model', default=None, metavar='NAME', help='name in requests (default: the first it has)')
    parser.add_argument('--api-key', default=None, metavar='KEY',
                        help='key of the server; better in LMDEPLOY_API_KEYS, which ps does not show')
    shared.add_lengths(parser, requests=100, input_len=128, output_len=128)
    group = parser.add_argument_group('arrivals')
    group.add_argument('--request-rate', type=shared.positive, default=math.inf, metavar='R',
                       help='requests per second, in a Poisson process (default: inf, all at once)')
    group.add_argument('--concurrency', type=shared.at_least(1), default=0, metavar='N',
                       help='requests at a time, at most (default: any number)')
    group.add_argument('--vocab-size', type=shared.at_least(2), default=30000, metavar='N',
                       help='prompts are random ids below it (default: %(default)s)')
    group.add_argument('--timeout', type=shared.positive, default=600.0, metavar='S',
                       help='seconds after which a request has failed (default: %(default)g)')
    shared.add_output(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.bench.online import Target, serve
    from lmdeploy.bench.report import Table, shown
    from lmdeploy.serve.openai.api_client import APIClient

    key = args.api_key or next(iter(env.api_keys()), None)
    model = args.model or APIClient(args.url, key).models()[0]
    target = Target(args.url, model, args.vocab_size, key, args.timeout)
    report = asyncio.run(serve(target, shared.workload(args), rate=args.request_rate, seed=args.seed,
                               concurrency=args.concurrency))
    shared.write(args, screen, report)
    print(f'{model}, {report.workload}, {shared.finite(report.request_rate)} requests/s, '
          f'{report.succeeded} of {report.requests} answered in {report.seconds:.2f} s')
    print(f'{shown(report.requests_per_second)} req/s, {shown(report.output_tokens_per_second)} output tok/s')
    table = Table(('ms', 'mean', 'p50', 'p90', 'p99'))
    for name, spread in (('first token', report.first_token), ('per output token', report.per_token),
                         ('between events', report.between_events), ('end to end', report.end_to_end)):
        if spread is not None:
            table.add(name, *(shown(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99)))
    table.print()
    for reason, count in report.errors.items():
        screen.note('bench_failed', count=count, reason=reason)
    return 1 if report.errors else 0
