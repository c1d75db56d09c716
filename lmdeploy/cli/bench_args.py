"""Arguments that benchmarks share, and what they make of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from lmdeploy.bench.shapes import QUANTISED
from lmdeploy.cli.args import UsageError, add_engine_arguments, engine_config

if TYPE_CHECKING:
    from lmdeploy.bench.offline import Bench
    from lmdeploy.bench.roofline import Roof
    from lmdeploy.bench.workload import Workload
    from lmdeploy.cli.screen import Screen
    from lmdeploy.config.model import ModelConfig

Report = TypeVar('Report')
DATASETS = ('fixed', 'sharegpt-like')


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is no smaller."""
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f'{value} is less than {least}')
        return value

    whole.__name__ = 'number'
    return whole


def positive(text: str) -> float:
    """A number above 0; ``inf`` is one."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f'{text} is not more than 0')
    return value


def add_model(parser: argparse.ArgumentParser, *, optional: str | None = None) -> None:
    parser.add_argument('model', metavar='MODEL', nargs='?' if optional else None, default=optional,
                        help='as for chat; or shapes:NAME, random weights of the shapes of shapes:llama3-8b, '
                             'shapes:internlm3-8b or shapes:qwen2.5-0.5b')


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('output')
    group.add_argument('--json', type=Path, default=None, metavar='FILE', help='write all that is known there, too')


def add_roof(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('roofline')
    group.add_argument('--copy-gbs', type=positive, default=None, metavar='GB/S',
                       help='memory bandwidth to compare with (default: measured)')
    group.add_argument('--peak-tflops', type=positive, default=None, metavar='TFLOP/S',
                       help='peak of matrix products to compare with (default: measured)')


def add_lengths(parser: argparse.ArgumentParser, requests: int, input_len: int, output_len: int) -> None:
    group = parser.add_argument_group('workload')
    group.add_argument('--num-prompts', type=at_least(1), default=requests, metavar='N',
                       help='requests (default: %(default)s)')
    group.add_argument('--dataset', choices=DATASETS, default='fixed',
                       help='lengths: all the same, or as in conversations (default: %(default)s)')
    group.add_argument('--input-len', type=at_least(1), default=input_len, metavar='N',
                       help='prompt tokens (default: %(default)s)')
    group.add_argument('--output-len', type=at_least(1), default=output_len, metavar='N',
                       help='generated tokens (default: %(default)s)')
    group.add_argument('--seed', type=at_least(0), default=0, metavar='N', help='of lengths, tokens and arrivals')


def add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--rounds', type=at_least(1), default=3, metavar='N',
                        help='runs after the warm-up; the one in the middle is reported (default: %(default)s)')


def add_engine(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser, template=False)
    parser.add_argument('--load-format', choices=('auto', 'dummy'), default='auto',
                        help="auto: the model's weights; dummy: random ones, of a folder with a config.json alone")
    add_quant(parser)


def add_quant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--quant', choices=tuple(QUANTISED), default=None, help='random weights, stored so')


def workload(args: argparse.Namespace) -> Workload:
    """The requests that the arguments spell."""
    from lmdeploy.bench.workload import fixed, sharegpt_like

    if args.dataset == 'sharegpt-like':
        return sharegpt_like(args.num_prompts, seed=args.seed)
    return fixed(args.num_prompts, args.input_len, args.output_len)


def measure(args: argparse.Namespace, screen: Screen, loads: Sequence[Workload],
            work: Callable[[Bench, Roof | None], Report]) -> Report:
    """Start the engine that the arguments spell, let ``work`` measure it, and write what comes out."""
    from lmdeploy.bench import shapes
    from lmdeploy.bench.offline import Bench
    from lmdeploy.config.options import normalise
    from lmdeploy.hub.resolve import resolve

    public = engine_config(args)
    engine = normalise(public)
    path = shapes.find(args.model)
    if path is not None or args.load_format == 'dummy':
        engine = replace(engine, load_format='dummy')
    if path is None and engine.load_format == 'dummy':
        path = shapes.config_alone(args.model)
    if path is None:
        path = resolve(args.model, revision=public.revision, download_dir=public.download_dir).path
    screen.note('loading', model=args.model)
    longest = max(given + made for load in loads for given, made in zip(load.inputs, load.outputs))
    model = args.model if args.quant is None else f'{args.model} {args.quant}'
    with TemporaryDirectory(prefix='lmdeploy-bench-') as folder:
        if args.quant is not None:
            engine, path = replace(engine, load_format='dummy'), shapes.quantised(path, args.quant, Path(folder))
        bench = Bench(engine, path, model, longest)
        try:
            report = work(bench, given_roof(args))
        finally:
            bench.close()
    write(args, screen, report)
    return report


def model_config(model: str) -> ModelConfig:
    """The shapes of a model, of which no weight is read."""
    from lmdeploy.bench import shapes
    from lmdeploy.config.model import ModelConfig
    from lmdeploy.hub.resolve import resolve
    from lmdeploy.weights.checkpoint import open_checkpoint
    from lmdeploy.weights.dummy import read_config

    path = shapes.find(model) or shapes.config_alone(model)
    if path is not None:
        return ModelConfig.from_dict(read_config(path))
    with open_checkpoint(resolve(model).path) as checkpoint:
        return ModelConfig.from_dict(checkpoint.config)


def given_roof(args: argparse.Namespace) -> Roof | None:
    """The roofline of the arguments; None: to be measured.

    Raises:
        UsageError: LMD-413, only one of the two was given.
    """
    from lmdeploy.bench.roofline import Roof

    if (args.copy_gbs is None) != (args.peak_tflops is None):
        raise UsageError('LMD-413')
    return None if args.copy_gbs is None else Roof(args.copy_gbs * 1e9, args.peak_tflops * 1e12)


def write(args: argparse.Namespace, screen: Screen, report: Any) -> None:
    """``--json``.

    Raises:
        UsageError: LMD-408, the file cannot be written.
    """
    from lmdeploy.bench.report import write_json

    if args.json is None:
        return
    try:
        write_json(args.json, report)
    except OSError as error:
        raise UsageError('LMD-408', path=args.json, reason=error.strerror or error) from None
    screen.note('written', path=args.json)


def tell_roof(screen: Screen, roof: Roof) -> None:
    copy, peak = roof.copy / 1e9, roof.peak / 1e12
    if roof.source == 'given':
        screen.note('bench_given_roof', copy=copy, peak=peak)
    else:
        screen.note('bench_measured_roof', copy=copy, peak=peak)


def finite(value: float) -> str:
    return 'inf' if math.isinf(value) else f'{value:g}'
