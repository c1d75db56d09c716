"""The report as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lmdeploy.lite.report import Report


def to_markdown(report: Report) -> str:
    """All of it but the plots."""
    parts = [f'# {title(report)}', _facts(report)]
    if report.quality:
        parts += ['## Quality on held-out text', table(*quality_rows(report))]
    parts += ['## Layers', "Relative error of every site's outputs, and (in brackets) that of plain rounding.",
              table(*layer_rows(report))]  # fmt: skip
    if report.answers:
        parts += ['## Answers', *(f'**{a.question}**\n\nBefore: {quoted(a.before)}\n\nAfter: {quoted(a.after)}'
                                  for a in report.answers)]  # fmt: skip
    parts += ['## Which programs load it', table(('program', 'loads'), report.loads_in.items()),
              f'Known from their sources; {next(iter(report.loads_in), "")} was run.', '## Try it',
              f'```sh\n{report.try_it}\n```']  # fmt: skip
    return '\n\n'.join(parts) + '\n'


def title(report: Report) -> str:
    return f'{report.model}: {report.scheme} ({report.format})'


def fact_rows(report: Report) -> list[tuple[str, str]]:
    """The run in short."""
    calibration = report.calibration
    rows = [('command', report.command), ('output', report.output),
            ('size', size_words(report)),
            ('bits per weight', f'{report.sizes.bits_per_weight:.3f} in quantised layers, scales included'),
            ('time', f'{report.seconds:.1f} s on {report.device}'), ('peak memory', mib(report.peak_bytes)),
            ('mean relative loss', f'{report.loss:.3e}'), ('lmdeploy', report.lmdeploy)]  # fmt: skip
    if calibration is not None:
        what = f'{calibration.name}: {calibration.samples} samples, {calibration.tokens} tokens'
        what += f' of {calibration.reduced} that were asked for' if calibration.reduced else ''
        what += f' (instead: {calibration.replaced})' if calibration.replaced else ''
        rows += [('calibration', what), ('calibration ids', f'sha256 {calibration.sha256}')]
    return rows


def quality_rows(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of the judgement."""
    headings = ('text', 'tokens', 'perplexity before', 'after', 'change', 'KL', 'same top token')
    rows: list[tuple[str, ...]] = [
        (f'{q.text} ({q.source})', str(q.tokens), f'{q.before:.3f}', f'{q.after:.3f}',
             f'{100 * q.increase:+.2f} % ± {100 * q.increase_error:.2f}', f'{q.kl:.4f} ± {q.kl_error:.4f}',
             f'{q.agreement:.1%}') for q in report.quality]  # fmt: skip
    return headings, rows


def layer_rows(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of the layers' losses and choices."""
    names = list(dict.fromkeys(name for layer in report.layers for name in layer.sites))
    rows = []
    for layer in report.layers:
        cells = []
        for name in names:
            site = layer.sites.get(name)
            chosen = '' if site is None else ' '.join(f'{k}={v}' for k, v in site.choices.items())
            cells.append('-' if site is None else f'{site.loss:.2e} ({site.baseline:.2e}) {chosen}'.strip())
        rows.append((str(layer.index), *cells, f'{layer.seconds:.1f}'))
    return ('layer', *names, 'seconds'), rows


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [headings, ['---'] * len(headings), *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in line) + ' |'
                     for line in lines)  # fmt: skip


def size_words(report: Report) -> str:
    """``256.6 MiB in 16 bits -> 108.6 MiB (42%)``, and what the source's file held if that is another."""
    sizes = report.sizes
    words = f'{mib(sizes.before)} in 16 bits -> {mib(sizes.after)} ({sizes.after / max(sizes.before, 1):.0%})'
    return words if abs(sizes.stored - sizes.before) < 0.01 * sizes.before else f'{words}; source {mib(sizes.stored)}'


def mib(count: int) -> str:
    return f'{count / 2**20:,.1f} MiB'


def quoted(text: str) -> str:
    return '\n'.join(f'> {line}' for line in text.splitlines() or [''])


def _facts(report: Report) -> str:
    return '\n'.join(f'* {name}: {value}' for name, value in fact_rows(report))
