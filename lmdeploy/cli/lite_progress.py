"""How a run is shown: what it works on, a line per layer, and the results."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lmdeploy.cli.screen import Screen

if TYPE_CHECKING:
    from lmdeploy.lite.calibration import Calibration
    from lmdeploy.lite.compare import Form, Row
    from lmdeploy.lite.driver import Event
    from lmdeploy.lite.recipe import SiteReport
    from lmdeploy.lite.report import Report

PHASES = {'read': 'reading', 'statistics': 'statistics', 'fit': 'fitting', 'fitted': 'fitting', 'tune': 'tuning',
          'write': 'writing', 'resume': 'done before', 'forward': 'passing through'}  # fmt: skip


class Progress:
    """A line for every finished layer; on a terminal a bar below, with the current layer's phase and losses."""

    def __init__(self, screen: Screen, layers: int) -> None:
        self.screen, self.layers = screen, layers
        self._layer_started = time.perf_counter()
        self._sites: dict[str, SiteReport] = {}
        self._resumed = False
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn('{task.description}'), BarColumn(), TextColumn('{task.completed}/{task.total}'),
                            TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))  # fmt: skip
            self._task = self._bar.add_task('starting', total=self.layers)
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Told by the driver."""
        if event.what == 'read':
            self._layer_started, self._sites, self._resumed = time.perf_counter(), {}, False
        elif event.what == 'resume':
            self._resumed = True
        elif event.what == 'fitted' and event.report is not None:
            self._sites[event.site] = event.report
        if event.what == 'layer':
            self._layer_done(event.layer)
        elif event.what in ('judge', 'answers'):
            self._print(self.screen.text(f'lite {event.what}'))
        elif self._bar is not None:
            phase = PHASES.get(event.what, event.what)
            self._bar.update(self._task, description=f'{event.layer + 1} {event.site} {phase}')

    def _layer_done(self, index: int) -> None:
        seconds = time.perf_counter() - self._layer_started
        sites = ''.join(f'  {name} {site.loss:.2e} ({_change(site)})' for name, site in self._sites.items())
        self._print(self.screen.text('lite resumed' if self._resumed else 'lite layer', index=index + 1,
                                     layers=self.layers, sites=sites, seconds=f'{seconds:.1f}',
                                     left=_minutes(seconds * (self.layers - index - 1))))  # fmt: skip
        if self._bar is not None:
            self._bar.update(self._task, completed=index + 1)

    def _print(self, line: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            self.screen.line(line)


class Forms:
    """Progress of ``lite compare``: the layer that is worked on, and a line for every form that was measured."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def step(self, event: Event) -> None:
        if event.what == 'layer' and sys.stderr.isatty():
            print(f'\rlayer {event.layer + 1} ', end='', file=sys.stderr, flush=True)

    def row(self, form: Form, row: Row) -> None:
        from lmdeploy.lite.markdown import mib

        self.screen.note('lite form', name=form.name, size=mib(row.bytes), memory=mib(row.peak_bytes),
                         pace=row.tokens_per_second, accuracy=row.accuracy)  # fmt: skip


def tell_calibration(screen: Screen, calibration: Calibration, reduced: int) -> None:
    """What the run works on; ``reduced``: tokens that were asked for, if they are more."""
    if calibration.replaced:
        screen.note('lite replaced', name=calibration.name, reason=calibration.replaced)
    screen.note('lite calibration', name=calibration.name, samples=len(calibration.sequences),
                length=max(map(len, calibration.sequences)), tokens=calibration.tokens)  # fmt: skip
    if reduced:
        screen.note('lite reduced', asked=f'{reduced:,}', used=f'{calibration.tokens:,}')
    if calibration.name == 'bundled':
        screen.note('lite bundled')


def tell_done(screen: Screen, report: Report) -> None:
    """The results, on stdout."""
    from lmdeploy.bench.report import Table
    from lmdeploy.lite.markdown import fact_rows, quality_rows

    facts = Table(('', ''), names=2)
    for name, value in fact_rows(report):
        if name in ('output', 'size', 'bits per weight', 'time', 'peak memory', 'calibration', 'mean relative loss'):
            facts.add(name, value)
    facts.print()
    if report.quality:
        headings, rows = quality_rows(report)
        quality = Table(headings)
        for row in rows:
            quality.add(*row)
        quality.print()
    worst = Table(('most sensitive', 'loss', 'plain rounding', 'chosen'), names=1)
    for layer, name, site in report.worst():
        worst.add(f'layer {layer} {name}', f'{site.loss:.2e}', f'{site.baseline:.2e}',
                  ' '.join(f'{k}={v}' for k, v in site.choices.items()) or '-')  # fmt: skip
    worst.print()
    screen.note('lite report', folder=report.output)
    print(report.try_it)


def _change(site: SiteReport) -> str:
    return f'{100 * (site.loss / site.baseline - 1):+.0f} %' if site.baseline else '-'


def _minutes(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'
