"""Two kinds of plots as SVG text: lines over layers, and horizontal bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 860, 320, 70, 36, 12, 110
COLOURS = ('#3b7dd8', '#d9822b', '#2e9c6a', '#b04fb5', '#c23b3b', '#6b7785')


@dataclass(frozen=True, slots=True)
class Line:
    """``thin_of``: drawn thin in the colour of the line of that name, without a label."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    thin_of: str = ''


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    value: float
    error: float = 0.0


def lines(given: Sequence[Line], logarithmic: bool = False) -> str:
    """Lines over a common axis; values that a logarithmic axis cannot show are left out."""
    shown = [Line(line.name, [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not logarithmic)],
                  line.thin_of) for line in given]  # fmt: skip
    points = [point for line in shown for point in line.points]
    if not points:
        return ''
    scale = (lambda y: math.log10(y)) if logarithmic else (lambda y: y)
    xs, ys = [x for x, _ in points], [scale(y) for _, y in points]
    low, high = (math.floor(min(ys)), math.ceil(max(ys))) if logarithmic else (min(0.0, *ys), max(ys))
    high = high if high > low else low + 1
    span = max(max(xs) - min(xs), 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - min(xs)) / span * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = []
    steps = range(int(low), int(high) + 1) if logarithmic else [low + (high - low) * i / 4 for i in range(5)]
    for step in steps:
        y = HEIGHT - BOTTOM - (step - low) / (high - low) * (HEIGHT - BOTTOM - TOP)
        label = f'1e{step}' if logarithmic else f'{step:.3g}'
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')  # fmt: skip
    for x in {min(xs), (min(xs) + max(xs)) // 2, max(xs)}:
        parts.append(f'<text x="{place(x, 10**low if logarithmic else low)[0]:.1f}" y="{HEIGHT - 14}" '
                     f'text-anchor="middle">{x:g}</text>')  # fmt: skip
    names = [line.name for line in shown if line.name]
    for line in shown:
        colour = COLOURS[names.index(line.name or line.thin_of) % len(COLOURS)]
        path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in (place(*point) for point in line.points))
        weight = '1" stroke-opacity="0.5' if line.thin_of else '2.5'
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{weight}" points="{path}"/>')
        if line.name:
            y = TOP + 14 + 18 * names.index(line.name)
            x, mark = WIDTH - RIGHT + 26, f'y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"'
            parts.append(f'<text x="{x}" y="{y}">{escape(line.name)}</text><line x1="{x - 18}" x2="{x - 4}" {mark}/>')
    return _svg(HEIGHT, parts)


def bars(given: Sequence[Bar]) -> str:
    """A bar for each value, from zero, with its error as a whisker."""
    if not given:
        return ''
    ends = [value for bar in given for value in (bar.value - bar.error, bar.value + bar.error)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    width = (WIDTH - 2 * LEFT - RIGHT) / ((high - low) or 1.0)
    zero, parts = 2 * LEFT - low * width, []
    for i, bar in enumerate(given):
        y, end = TOP + 28 * i, zero + bar.value * width
        parts.append(f'<text x="{2 * LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>'
                     f'<rect x="{min(zero, end):.1f}" y="{y}" width="{abs(end - zero):.1f}" height="20" '
                     f'fill="{COLOURS[i % len(COLOURS)]}"/>')  # fmt: skip
        if bar.error:
            first, last = end - bar.error * width, end + bar.error * width
            parts.append(f'<line x1="{first:.1f}" x2="{last:.1f}" y1="{y + 10}" y2="{y + 10}" stroke="currentColor"/>')
        label = max(end, zero) + bar.error * width + 8
        parts.append(f'<text x="{label:.1f}" y="{y + 15}">{bar.value:,.4g}</text>')
    return _svg(TOP + 28 * len(given) + 8, parts)


def _svg(height: float, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" role="img">'
            f'{"".join(parts)}</svg>')  # fmt: skip
