"""A whole run, from a model's name to a finished folder with its report."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmdeploy.chat import resolve_template
from lmdeploy.config.quantization import Storage
from lmdeploy.errors import ConfigError
from lmdeploy.lite.answers import compare_answers
from lmdeploy.lite.calibration import Calibration, Sampler
from lmdeploy.lite.corpora import held_out, load_corpus
from lmdeploy.lite.driver import Driver, Event, Streams, Watch
from lmdeploy.lite.evaluate import Head, Quality, judge
from lmdeploy.lite.hidden import Hidden
from lmdeploy.lite.html import to_html
from lmdeploy.lite.markdown import to_markdown
from lmdeploy.lite.methods import fitting_groups, nearest_group
from lmdeploy.lite.output import placed, write_output
from lmdeploy.lite.recipe import ROLES, SITES, Need, Recipe
from lmdeploy.lite.report import CalibrationReport, LayerReport, Report, Sizes, from_json, loads_in, sizes_of, to_json
from lmdeploy.lite.source import Source, open_source
from lmdeploy.lite.workdir import REPORT, STATE, WorkDir, open_shard
from lmdeploy.quant.formats.base import scheme_of
from lmdeploy.runner.host import limit_threads
from lmdeploy.runner.model_runner import choose_device
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.version import __version__

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
CPU_WORK = 1e13  # operations that statistics may take where the user leaves it to us
LEAST_TOKENS = 2048
CPU_JUDGED, GPU_JUDGED = 2048, 16384  # tokens of each held-out text
WINDOW = 512  # tokens of a held-out window


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is told besides its recipe; names and defaults are those of the command line.

    Attributes:
        calib_tokens: most tokens that statistics are taken from; None: all samples on a GPU, and on a CPU as many as
            take minutes, not hours.
        eval_tokens: of each held-out text; None: as many as the device does quickly; 0: no judgement.
        dtype: of what stays dense; ``'auto'``: the model's own.
        restart: delete what an unlike run has left in the folder.
        answers: ask both models a few questions at the end, in processes of their own, as anybody would.
    """

    work_dir: Path = Path('./work_dir')
    calib_dataset: str = 'mix'
    calib_samples: int = 128
    calib_seqlen: int = 2048
    calib_tokens: int | None = None
    batch_size: int = 1
    eval_tokens: int | None = None
    dtype: str = 'auto'
    device: str = 'auto'
    restart: bool = False
    answers: bool = True


@dataclass(slots=True)
class Job:
    """An open model and everything that is known before the work starts.

    Life: :meth:`open` refuses what cannot work, :meth:`run` works, :meth:`close` closes the files.

    Attributes:
        reduced: tokens that were asked for, if fewer are used; else 0.
    """

    source: Source
    options: Options
    device: torch.device
    tokenizer: Tokenizer | None
    recipe: Recipe
    calibration: Calibration
    judged: list[tuple[str, Calibration]]
    reduced: int = 0
    quality: list[Quality] = field(default_factory=list)

    @staticmethod
    def open(path: Path, recipe: Recipe, options: Options, *, dummy: bool = False) -> Job:
        """Read what is needed to say what will be done.

        Args:
            path: model folder or GGUF file. dummy: random weights of its config's shapes.

        Raises:
            ConfigError, LoadError: what cannot be quantised so, before any work.
        """
        limit_threads()
        device = choose_device(options.device)
        source = open_source(path, DTYPES.get(options.dtype), dummy=device if dummy else None)
        try:
            recipe.prepare(source.spec)
            check_groups(source, recipe)
            tokenizer = Tokenizer(str(path))
            sampler = sampler_of(path, tokenizer)
            corpus = load_corpus(options.calib_dataset)
            length, samples, reduced = amount(source, options, device, recipe.needs)
            calibration = sampler.sample(corpus, samples, length)
            tokens = CPU_JUDGED if device.type == 'cpu' else GPU_JUDGED
            judged = judged_texts(sampler, tokens if options.eval_tokens is None else options.eval_tokens)
        except BaseException:
            source.checkpoint.close()
            raise
        return Job(source, options, device, tokenizer, recipe, calibration, judged, reduced)

    def close(self) -> None:
        self.source.checkpoint.close()

    @property
    def key(self) -> str:
        """By which equal runs know each other: model, recipe, calibration, and whatever else changes the output."""
        path = self.source.path
        files = [path] if path.is_file() else sorted(path.glob('*.safetensors'))
        facts = {
            'version': 1, 'recipe': self.recipe.key(), 'config': self.source.checkpoint.config,
            'files': [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
            'calibration': self.calibration.digest, 'judged': [text.digest for _, text in self.judged],
            'dtype': str(self.source.dtype), 'device': self.device.type, 'batch': self.options.batch_size,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def finished(self) -> Report | None:
        """The report of an equal run that has ended in this folder; None: there is none."""
        if self.options.restart or not WorkDir.finished(self.options.work_dir, self.key):
            return None
        return from_json((self.options.work_dir / REPORT).read_text(encoding='utf-8'))

    @property
    def storage(self) -> Storage:
        """How most layers are stored."""
        found = [s for s in placed(self.source, self.recipe).values() if s is not None]
        return max(found, key=found.count)

    def run(self, watch: Watch, command: str = '', model: str = '') -> Report:
        """Do it, or go on with it; returns the report, which lies in the folder, too.

        Args:
            command, model: as typed, for the report.

        Raises:
            ConfigError: LMD-603 to LMD-605, the folder. LoadError: what is wrong with the weights.
        """
        started = time.perf_counter()
        if self.device.type != 'cpu':
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.cuda.reset_peak_memory_stats(self.device)
        work = WorkDir.open(self.options.work_dir, self.key, restart=self.options.restart)
        streams = self._streams(work)
        Driver(self.source, self.recipe, work, streams, self.device, watch).run()
        if streams.held_out is not None and streams.held_out_float is not None:
            watch(Event('judge', self.source.num_layers))
            self.quality = self._judge(work, streams.held_out_float, streams.held_out)
        write_output(self.source, self.recipe, work, self.tokenizer)
        report = self._report(work, time.perf_counter() - started, command, model)
        if self.options.answers:
            watch(Event('answers', self.source.num_layers))
            report.answers = compare_answers(self.source.path, work.path, self.options.device)
        write_report(work, report)
        work.close()
        return report

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _streams(self, work: WorkDir) -> Streams:
        def stream(sequences: Sequence[torch.Tensor], name: str) -> Hidden:
            file = work.path / STATE / f'{name}.bin'
            return Hidden(sequences, self.source.config.hidden_size, self.options.batch_size, self.device, file,
                          compute_type(self.source, self.device))  # fmt: skip

        streams = Streams(stream(self.calibration.sequences, 'calibration'))
        if 'cross' in self.recipe.needs:
            streams.calibration_float = stream(self.calibration.sequences, 'float')
        texts = [ids for _, text in self.judged for ids in text.sequences]
        if texts:
            streams.held_out, streams.held_out_float = stream(texts, 'held_out'), stream(texts, 'held_out_float')
        return streams

    def _judge(self, work: WorkDir, exact: Hidden, quantised: Hidden) -> list[Quality]:
        source, eps = self.source, self.source.config.rms_norm_eps
        names, checkpoint = source.top_names(), source.checkpoint
        own = names['embedding' if source.config.tie_word_embeddings else 'head']
        norm = source.read_norm(source.body.child(source.spec.names.final_norm), self.device)
        weight = checkpoint.get(own, None, source.dtype).to(self.device)
        before = Head(norm, weight.float(), eps)
        with open_shard(work.path / work.shards[0].file) as shard:
            stored = names['head'] if names['head'] in shard.names() else names['embedding']
            final = source.read_norm(shard.prefix(source.body.child(source.spec.names.final_norm).path), self.device)
            other = shard.get(stored).to(self.device)
            after = Head(final, before.weight if torch.equal(weight, other) else other.float(), eps)
        texts = [(name, text.name, len(text.sequences)) for name, text in self.judged]
        return judge(texts, exact, quantised, before, after)

    def _report(self, work: WorkDir, seconds: float, command: str, model: str) -> Report:
        storage = self.storage
        layers = [LayerReport(i - 1, record.seconds, record.sites) for i, record in sorted(work.shards.items()) if i]
        linears = [name for name, stored in placed(self.source, self.recipe).items() if stored is not None]
        calibration = CalibrationReport(self.calibration.name, len(self.calibration.sequences), self.calibration.tokens,
                                        self.calibration.digest, self.calibration.replaced, self.reduced)  # fmt: skip
        sizes: Sizes = sizes_of(self.source, work, linears)
        return Report(
            self.key, __version__, command, model or str(self.source.path), str(work.path), str(scheme_of(storage)),
            storage.format, self.recipe.key(), device_name(self.device), str(self.source.dtype).removeprefix('torch.'),
            calibration, layers, sizes, round(seconds, 1), peak_bytes(self.device), self.quality,
            loads_in=loads_in(storage, bool(self.recipe.extra_config())),
            try_it=f'lmdeploy chat {work.path}')  # fmt: skip


def open_calibration(path: Path, options: Options) -> tuple[Source, Calibration, int, torch.device]:
    """A model, its calibration tokens, how many were asked for if they are more, and the device."""
    limit_threads()
    device, source = choose_device(options.device), open_source(path, DTYPES.get(options.dtype))
    try:
        length, samples, reduced = amount(source, options, device, frozenset())
        calibration = sampler_of(path, Tokenizer(str(path))).sample(load_corpus(options.calib_dataset), samples, length)
    except BaseException:
        source.checkpoint.close()
        raise
    return source, calibration, reduced, device


def sampler_of(path: Path, tokenizer: Tokenizer) -> Sampler:
    return Sampler(tokenizer, resolve_template(str(path), tokenizer))


def write_report(work: WorkDir, report: Report) -> None:
    """quant_report.md, .html and, last, .json."""
    for suffix, render in (('md', to_markdown), ('html', to_html), ('json', to_json)):
        _write(work, REPORT.replace('json', suffix), render, report)


def _write(work: WorkDir, name: str, render: Callable[[Report], str], report: Report) -> None:
    text = render(report)
    work.write(name, lambda path: path.write_text(text, encoding='utf-8'))


def check_groups(source: Source, recipe: Recipe) -> None:
    """Every group divides the inputs of its layer, and eight outputs share a word where the format has it so.

    Raises:
        ConfigError: LMD-606, with sizes that do.
    """
    widths = {role: (out, wide) for role, out, wide in source.sizes()}
    for i in range(source.num_layers):
        for site in SITES:
            storage = recipe.storage(i, site)
            for role in ROLES[site] if storage is not None else ():
                out, wide = widths[role]
                group = storage.group if storage is not None else 0
                if group and wide % group:
                    fitting = fitting_groups(source)
                    near = nearest_group(fitting, group)
                    raise ConfigError('LMD-606', group=group, width=wide, remainder=wide % group, proposal=near,
                                      layer=f'{source.layer_path(i)}.{source.linear_names()[role]}',
                                      possible=', '.join(map(str, fitting)) or '-1')  # fmt: skip
                if storage is not None and storage.format == 'awq' and out % 8:
                    reason = f'{source.linear_names()[role]} has {out} outputs, no multiple of 8'
                    raise ConfigError('LMD-610', option='--format', value='awq', reason=reason)


def amount(source: Source, options: Options, device: torch.device, needs: frozenset[Need]) -> tuple[int, int, int]:
    """``(tokens of a sample, samples, tokens that were asked for if that is more)``.

    Raises:
        ConfigError: LMD-611: samples are longer than the model's context.
    """
    length, samples = options.calib_seqlen, options.calib_samples
    most = source.config.max_position_embeddings
    if length > most:
        raise ConfigError('LMD-611', value=length, most=most)
    asked = length * samples
    limit = options.calib_tokens
    if limit is None and device.type == 'cpu':
        layer = sum(out * wide for _, out, wide in source.sizes())
        moments = 3 * source.config.hidden_size ** 2 + source.config.intermediate_size ** 2
        work = source.num_layers * (4 * layer + (2 * moments if 'hessian' in needs else 0))
        wide = max(wide for _, _, wide in source.sizes())
        least = 2 * wide if 'hessian' in needs else 0  # with fewer tokens than channels, errors are fitted to noise
        limit = max(LEAST_TOKENS, least, int(CPU_WORK / work))
    if limit is None or asked <= limit:
        return length, samples, 0
    return min(length, limit), max(1, limit // min(length, limit)), asked


def judged_texts(sampler: Sampler, tokens: int) -> list[tuple[str, Calibration]]:
    """Held-out windows by language; nothing where ``tokens`` is 0."""
    if not tokens:
        return []
    return [(name, sampler.head(corpus, tokens, min(WINDOW, tokens))) for name, corpus in held_out().items()]


def compute_type(source: Source, device: torch.device) -> torch.dtype:
    """What layers are computed in: float32 on a CPU, the model's own type on a GPU, as it will be served."""
    return torch.float32 if device.type == 'cpu' else source.dtype


def peak_bytes(device: torch.device) -> int:
    """The most memory there was in use: of the GPU, or of this process."""
    if device.type != 'cpu':
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == 'win32':
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == 'darwin' else most * 1024


def device_name(device: torch.device) -> str:
    return f'{torch.get_num_threads()} CPU threads' if device.type == 'cpu' else torch.cuda.get_device_name(device)
