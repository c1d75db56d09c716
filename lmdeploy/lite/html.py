"""The report as one HTML page that needs nothing else: tables, and plots as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lmdeploy.lite.markdown import fact_rows, layer_rows, quality_rows, title
from lmdeploy.lite.plot import Bar, Line, bars, lines
from lmdeploy.lite.recipe import SITES
from lmdeploy.lite.report import Report

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --back: #ffffff; --line: #d5dae0; --soft: #66707a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --back: #15181b; --line: #394049; --soft: #9aa4ae; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 2rem auto;
       max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; } pre { white-space: pre-wrap; margin: 0; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } p.soft { color: var(--soft); }
"""


def to_html(report: Report) -> str:
    """The whole page."""
    parts = [f'<h1>{escape(title(report))}</h1>', _table(('', ''), fact_rows(report))]
    parts += ['<h2>Loss per layer</h2>', soft('Relative error of the outputs of every site after quantisation; thin: '
              'plain rounding to the nearest.'), lines(_losses(report), logarithmic=True)]  # fmt: skip
    if any(site.outliers[0] for layer in report.layers for site in layer.sites.values()):
        parts += ['<h2>Outliers of inputs</h2>', soft('Largest magnitude over the mean one; thin: before scaling.'),
                  lines(_outliers(report), logarithmic=True)]  # fmt: skip
    if report.quality:
        increase = [Bar(q.text, 100 * q.increase, 100 * q.increase_error) for q in report.quality]
        parts += ['<h2>Quality on held-out text</h2>', _table(*quality_rows(report)),
                  soft('Increase of perplexity in percent, with its standard error.'), bars(increase)]  # fmt: skip
    sizes = report.sizes
    both = [Bar('16 bits, MiB', sizes.before / 2**20), Bar('after, MiB', sizes.after / 2**20)]
    parts += ['<h2>Size</h2>', bars(both)]
    parts += ['<h2>Layers</h2>', _table(*layer_rows(report))]
    if report.answers:
        rows = [(a.question, a.before, a.after) for a in report.answers]
        parts += ['<h2>Answers</h2>', _table(('question', 'before', 'after'), rows)]
    parts += ['<h2>Which programs load it</h2>', _table(('program', 'loads'), report.loads_in.items()),
              '<h2>Try it</h2>', f'<pre>{escape(report.try_it)}</pre>']  # fmt: skip
    body = '\n'.join(parts)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title(report))}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n{body}\n'
            '</body></html>\n')  # fmt: skip


def _losses(report: Report) -> list[Line]:
    found = []
    for name in SITES:
        points = [(layer.index, layer.sites[name]) for layer in report.layers if name in layer.sites]
        found.append(Line(name, [(i, site.loss) for i, site in points]))
        found.append(Line('', [(i, site.baseline) for i, site in points], thin_of=name))
    return found


def _outliers(report: Report) -> list[Line]:
    found = []
    for name in SITES:
        points = [(layer.index, layer.sites[name]) for layer in report.layers if name in layer.sites]
        found.append(Line(name, [(i, site.outliers[1]) for i, site in points]))
        found.append(Line('', [(i, site.outliers[0]) for i, site in points], thin_of=name))
    return found


def soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _cell(text: str) -> str:
    return f'<td><pre>{escape(text)}</pre></td>' if '\n' in text else f'<td>{escape(text)}</td>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = ''.join(f'<th>{escape(cell)}</th>' for cell in headings) if any(headings) else ''
    body = ''.join(f'<tr>{"".join(map(_cell, row))}</tr>' for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
