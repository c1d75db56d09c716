"""``lmdeploy bench``: a table of benchmarks, which are modules with ``add_arguments`` and ``run`` as commands are."""

from __future__ import annotations

import argparse

from lmdeploy.cli.entrypoint import Command, add_table
from lmdeploy.cli.screen import Screen

BENCHMARKS = {
    'throughput': Command('lmdeploy.cli.bench_throughput', 'many requests through the engine, as fast as it goes'),
    'latency': Command('lmdeploy.cli.bench_latency', 'one request after another: first token, and time per token'),
    'suite': Command('lmdeploy.cli.bench_suite', 'the workloads by which engines are compared, one after another'),
    'serve': Command('lmdeploy.cli.bench_serve', 'requests that arrive at a running server'),
    'kernels': Command('lmdeploy.cli.bench_kernels', 'every kernel of this device beside its bound'),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_table(parser, BENCHMARKS, 'benchmark', 'benchmarks')


def run(args: argparse.Namespace, screen: Screen) -> int:
    return BENCHMARKS[args.benchmark].load().run(args, screen)
