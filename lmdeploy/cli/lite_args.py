"""Arguments that the methods of ``lmdeploy lite`` share, and the run that they describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy.cli.bench_args import at_least
from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.hub.resolve import ModelFiles
    from lmdeploy.lite.job import Options
    from lmdeploy.lite.recipe import Recipe

EFFORTS = ('fast', 'normal', 'high')


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', metavar='MODEL', help='as for chat: a folder, a GGUF file, an alias, a hub id')
    parser.add_argument('--work-dir', default='./work_dir', metavar='DIR',
                        help='where the new model goes, and where an interrupted run goes on (default: %(default)s)')
    parser.add_argument('--revision', default=None, help='branch, tag or commit on the hub')
    parser.add_argument('--download-dir', default=None, metavar='DIR', help='folder for downloads')
    parser.add_argument('--trust-remote-code', action='store_true', help='accepted: code in a model is never run')


def add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('calibration')
    group.add_argument('--calib-dataset', default='mix', metavar='NAME|PATH',
                       help='mix, ptb, wikitext2, c4, pileval, bundled; or a text or .jsonl file, or a folder of such '
                            '(default: %(default)s)')
    group.add_argument('--calib-samples', type=at_least(1), default=128, metavar='N', help='default: %(default)s')
    group.add_argument('--calib-seqlen', type=at_least(2), default=2048, metavar='N',
                       help='tokens of a sample (default: %(default)s)')
    group.add_argument('--calib-tokens', type=_tokens, default=None, metavar='N|all',
                       help='most tokens in all (default: all samples on a GPU; on a CPU what takes minutes, which is '
                            'said)')
    group.add_argument('--batch-size', type=at_least(1), default=1, metavar='N',
                       help='samples that are computed at once (default: %(default)s)')


def add_work(parser: argparse.ArgumentParser, *, effort: bool = True) -> None:
    group = parser.add_argument_group('work')
    if effort:
        group.add_argument('--effort', choices=EFFORTS, default='normal', help='default: %(default)s')
    group.add_argument('--dtype', choices=('auto', 'float16', 'bfloat16'), default='auto',
                       help='type of what stays as it is (default: as stored)')
    group.add_argument('--device', choices=('auto', 'cuda', 'cpu'), default='auto',
                       help='default: the GPU if there is one')
    group.add_argument('--eval-tokens', type=at_least(0), default=None, metavar='N',
                       help='tokens of each held-out text on which the result is judged; 0: not at all')
    group.add_argument('--no-answers', action='store_true', help='no sample answers in the report')
    group.add_argument('--restart', action='store_true', help='delete what another run has left in the folder')


def add_groups(parser: argparse.ArgumentParser, *, bits: int = 4, group: int = 128) -> None:
    parser.add_argument('--w-bits', type=at_least(2), default=bits, metavar='N', help='default: %(default)s')
    parser.add_argument('--w-group-size', type=int, default=group, metavar='N',
                        help='input channels that share a scale; -1: all (default: %(default)s)')


def add_rotation(parser: argparse.ArgumentParser) -> None:
    """Which rotation goes before the rounding, for formats that can carry one to the run time."""
    parser.add_argument('--rotation', choices=('none', 'portable', 'native'), default='native',
                        help='native: Hadamard transforms of inputs while the model runs, the most exact; portable: '
                             'folded into the weights (default: %(default)s)')


def _tokens(text: str) -> int:
    return sys.maxsize if text == 'all' else at_least(2)(text)


def options(args: argparse.Namespace) -> Options:
    """The run that the flags spell."""
    from lmdeploy.lite.job import Options

    return Options(Path(args.work_dir).expanduser(), args.calib_dataset, args.calib_samples, args.calib_seqlen,
                   args.calib_tokens, args.batch_size, args.eval_tokens, args.dtype, args.device, args.restart,
                   not args.no_answers)  # fmt: skip


def find(args: argparse.Namespace) -> ModelFiles:
    """The model's files, downloaded if they are not here."""
    from lmdeploy.hub.resolve import resolve

    return resolve(args.model, revision=args.revision, download_dir=args.download_dir)


def quantise(args: argparse.Namespace, screen: Screen, what: str, recipe: Callable[[], Recipe]) -> int:
    """Run a method: a first line at once, progress, the table of results.

    Args:
        what: the plan in words, for the first line.
        recipe: makes it; called when torch may be imported.
    """
    screen.note('lite plan', method=args.method, model=args.model, what=what, folder=args.work_dir)
    files = find(args)
    from lmdeploy.cli.lite_progress import Progress, tell_calibration, tell_done
    from lmdeploy.lite.job import Job

    job = Job.open(files.path, recipe(), options(args))
    try:
        done = job.finished()
        if done is not None:
            screen.note('lite done already', folder=args.work_dir)
            tell_done(screen, done)
            return 0
        tell_calibration(screen, job.calibration, job.reduced)
        with Progress(screen, job.source.num_layers) as progress:
            report = job.run(progress, ' '.join(['lmdeploy', *sys.argv[1:]]), args.model)
    finally:
        job.close()
    tell_done(screen, report)
    return 0
