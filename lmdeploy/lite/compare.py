"""One model in every form of the usual table: size, memory while it answers, pace and accuracy, measured here.

Every form is made as its command makes it and then measured in a process of its own: the loss of held-out tokens is
that of the engine, with its kernels and its KV cache, not of a simulation.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lmdeploy.config import env
from lmdeploy.errors import EngineDead
from lmdeploy.lite import methods
from lmdeploy.lite.driver import Watch, nobody
from lmdeploy.lite.html import STYLE, soft
from lmdeploy.lite.job import Job, Options, judged_texts, sampler_of
from lmdeploy.lite.markdown import mib, table
from lmdeploy.lite.plot import Bar, bars
from lmdeploy.lite.recipe import Effort, Recipe
from lmdeploy.lite.source import open_source
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.version import __version__

SECONDS = 3600
REPORT = 'compare.json'


@dataclass(frozen=True, slots=True)
class Form:
    """One row of the table.

    Attributes:
        name: as the table says. folder: of its weights below the work folder, ``''`` for the model itself; forms with
            equal folders share weights. recipe: ``None`` for the model itself. kv_bits: of the KV cache; 0: 16.
    """

    name: str
    folder: str
    recipe: Callable[[int, Effort], Recipe] | None
    kv_bits: int = 0


FORMS = (
    Form('FP16', '', None),
    Form('W8A8', 'w8a8', lambda group, effort: methods.smooth_quant('int8', effort=effort)),
    Form('W4A16', 'w4a16', lambda group, effort: methods.awq(4, group, effort=effort)),
    Form('W4A8', 'w4a8', lambda group, effort: methods.packed('w4a8', group, effort=effort)),
    Form('W4A8 + KV8', 'w4a8', lambda group, effort: methods.packed('w4a8', group, effort=effort), 8),
    Form('2-bit', 'w2', lambda group, effort: methods.packed('w2', min(group, 64), effort=effort)),
)


@dataclass(slots=True)
class Row:
    """What was measured of a form.

    Attributes:
        bytes: of its weights, those of the model in 16 bits. peak_bytes: most memory of the process that answers, or
            of the GPU.
        accuracy: perplexity of the model over that of the form, on all held-out tokens; 1 is no loss.
        error: standard error of accuracy, from the differences of windows.
        seconds: that quantising took.
    """

    name: str
    bytes: int
    peak_bytes: int
    tokens_per_second: float
    loss: float
    accuracy: float
    error: float
    seconds: float
    kernel: str = ''


@dataclass(slots=True)
class Comparison:
    """All rows, and what they were measured with."""

    model: str
    lmdeploy: str
    device: str
    group: int
    tokens: int
    rows: list[Row] = field(default_factory=list)


def compare(path: Path, model: str, options: Options, effort: Effort = 'normal', *, forms: Sequence[Form] = FORMS,
            watch: Watch = nobody, told: Callable[[Form, Row], None] | None = None) -> Comparison:  # fmt: skip
    """Make and measure all ``forms`` below ``options.work_dir``; what an equal run has made is used again.

    Args:
        path: the model's files. model: as typed. watch: told of every step of quantising, ``told`` of every row.

    Raises:
        ConfigError, LoadError: as quantising; EngineDead: LMD-612, a form did not run.
    """
    source = open_source(path)
    with source.checkpoint:
        group = methods.nearest_group(methods.fitting_groups(source), 128)
        sixteen = sum(2 * math.prod(source.checkpoint.stored(name).shape) for name in source.checkpoint.names())
        judged = judged_texts(sampler_of(path, Tokenizer(str(path))), options.eval_tokens or 1024)
    windows = [ids.tolist() for _, text in judged for ids in text.sequences]
    options.work_dir.mkdir(parents=True, exist_ok=True)
    ids = options.work_dir / 'held_out.json'
    ids.write_text(json.dumps(windows), encoding='utf-8')
    found = Comparison(model, __version__, options.device, group, sum(len(window) - 1 for window in windows))
    first: list[float] = []
    for form in forms:
        folder, seconds = path, 0.0
        if form.recipe is not None:
            folder = options.work_dir / form.folder
            job = Job.open(path, form.recipe(group, effort), replace(options, work_dir=folder, answers=False,
                                                                     eval_tokens=0))  # fmt: skip
            try:
                seconds = (job.finished() or job.run(watch, f'compare: {form.name}', model)).seconds
            finally:
                job.close()
        if form.recipe is None:
            size = sixteen
        else:
            size = sum(file.stat().st_size for file in folder.glob('*.safetensors'))
        row, losses = _measure(form, folder, ids, options.device, seconds, size)
        first = first or losses
        weights = [len(window) - 1 for window in windows]
        row.accuracy, row.error = _relative(first, losses, weights)
        row.loss = sum(loss * count for loss, count in zip(losses, weights)) / sum(weights)
        found.rows.append(row)
        if told is not None:
            told(form, row)
    write(options.work_dir, found)
    return found


def _measure(form: Form, folder: Path, ids: Path, device: str, seconds: float,
             size: int) -> tuple[Row, list[float]]:
    """A process of its own loads the form and answers."""
    command = [sys.executable, '-m', 'lmdeploy.cli.lite_measure', str(folder), str(ids), '--device', device,
               '--quant-policy', str(form.kv_bits), *([] if form.recipe else ['--exact'])]  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    out = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL,
                         env=env.child_environment(PYTHONPATH=root, PYTHONIOENCODING='utf-8'))  # fmt: skip
    if out.returncode:
        raise EngineDead('LMD-612', form=form.name, reason=(out.stderr.strip().splitlines() or ['no message'])[-1])
    facts = json.loads(out.stdout.strip().splitlines()[-1])
    row = Row(form.name, size, facts['peak_bytes'], facts['tokens_per_second'], 0.0, 1.0, 0.0, seconds,
              facts['choices'].get('linear', ''))  # fmt: skip
    return row, facts['losses']


def _relative(first: Sequence[float], losses: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """``exp(-mean difference)`` and its standard error over windows."""
    total = sum(weights)
    differences = [b - a for a, b in zip(first, losses)]
    mean = sum(d * w for d, w in zip(differences, weights)) / total
    count = len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(count - 1, 1) / count)
    return math.exp(-mean), math.exp(-mean) * spread


def write(folder: Path, found: Comparison) -> None:
    """compare.json, .md and .html."""
    (folder / REPORT).write_text(json.dumps(asdict(found), indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    page = f'# {found.model}\n\n{table(*cells(found))}\n\n{words(found)}\n'
    (folder / 'compare.md').write_text(page, encoding='utf-8')
    (folder / 'compare.html').write_text(to_html(found), encoding='utf-8')


def cells(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The usual table: headings and rows."""
    headings = ('form', 'model size', 'memory while answering', 'tokens/s', 'relative accuracy', 'quantised in')
    rows: list[tuple[str, ...]] = [
        (row.name, mib(row.bytes), mib(row.peak_bytes), f'{row.tokens_per_second:.1f}',
         f'{row.accuracy:.1%} ± {row.error:.1%}', f'{row.seconds:.0f} s' if row.seconds else '-')
        for row in found.rows]  # fmt: skip
    return headings, rows


def words(found: Comparison) -> str:
    return (f'Relative accuracy is the perplexity of the model over that of the form on {found.tokens:,} held-out '
            f'tokens of English, Chinese and code; groups of {found.group} (of 64 at most with 2 bits); one answer at '
            f'a time on {found.device}.')  # fmt: skip


def to_html(found: Comparison) -> str:
    """The table and a plot of each column."""
    headings, rows = cells(found)
    head = ''.join(f'<th>{cell}</th>' for cell in headings)
    body = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)
    plots = (('Model size, MiB', [Bar(row.name, row.bytes / 2**20) for row in found.rows]),
             ('Memory while answering, MiB', [Bar(row.name, row.peak_bytes / 2**20) for row in found.rows]),
             ('Tokens per second', [Bar(row.name, row.tokens_per_second) for row in found.rows]),
             ('Relative accuracy, %', [Bar(row.name, 100 * row.accuracy, 100 * row.error) for row in found.rows]))
    drawn = ''.join(f'<h2>{name}</h2>{bars(values)}' for name, values in plots)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>lmdeploy lite compare</title>'
            f'<style>{STYLE}</style></head><body><h1>lmdeploy lite compare</h1><table><tr>{head}</tr>{body}</table>'
            f'{soft(words(found))}{drawn}</body></html>\n')  # fmt: skip
