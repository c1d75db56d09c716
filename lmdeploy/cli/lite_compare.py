"""``lmdeploy lite compare``: one model in every form of the usual table, measured on this machine."""

from __future__ import annotations

import argparse

from lmdeploy.cli import lite_args as shared
from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument('--forms', nargs='+', default=None, metavar='FORM',
                        help='some of fp16 w8a8 w4a16 w4a8 w4a8+kv8 2-bit (default: all; fp16 always is)')
    shared.add_calibration(parser)
    shared.add_work(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    screen.note('lite plan', method=args.method, model=args.model, what='all forms', folder=args.work_dir)
    files = shared.find(args)
    from lmdeploy.bench.report import Table
    from lmdeploy.cli.lite_progress import Forms
    from lmdeploy.errors import ConfigError
    from lmdeploy.lite.compare import FORMS, cells, compare, words

    wanted = None if args.forms is None else {form.lower() for form in args.forms} | {'fp16'}
    known = {form.name.lower().replace(' ', ''): form for form in FORMS}
    if wanted is not None and not wanted <= known.keys():
        reason = f'possible are {", ".join(known)}'
        raise ConfigError('LMD-610', option='--forms', value=', '.join(sorted(wanted - known.keys())), reason=reason)
    forms = [form for name, form in known.items() if wanted is None or name in wanted]
    shown = Forms(screen)
    found = compare(files.path, args.model, shared.options(args), args.effort, forms=forms, watch=shown.step,
                    told=shown.row)  # fmt: skip
    headings, rows = cells(found)
    table = Table(headings)
    for row in rows:
        table.add(*row)
    table.print()
    print(words(found))
    screen.note('lite compared', folder=args.work_dir)
    return 0
