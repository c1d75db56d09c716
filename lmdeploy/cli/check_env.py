"""``lmdeploy check_env``: what a bug report should say of this machine."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

from lmdeploy.cli.args import UsageError
from lmdeploy.cli.screen import Screen
from lmdeploy.version import __version__

PACKAGES = ('torch', 'triton', 'numpy', 'safetensors', 'tokenizers', 'sentencepiece', 'jinja2', 'pillow',
            'huggingface_hub', 'prompt_toolkit', 'rich', 'transformers', 'fastapi', 'pydantic', 'uvicorn', 'ray')
PROVEN_TRITON = '3.6'  # the version that the kernels are proven on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--dump-file', type=Path, default=None, metavar='FILE',
                        help='write it to a .json or .yml file too')
    parser.add_argument('--explain', action='store_true',
                        help='print instead which kernels this device would run, and why not the others')


def run(args: argparse.Namespace, screen: Screen) -> int:
    if args.explain:
        from lmdeploy.extend import explain

        print(explain())
        return 0
    facts = collect()
    print('\n'.join(f'{name}: {value}' for name, value in facts.items()))
    if args.dump_file is not None:
        dump(facts, args.dump_file)
        screen.note('written', path=args.dump_file)
    return 0


def collect() -> dict[str, str]:
    """The facts, in the order in which they are printed."""
    from lmdeploy.runner.host import processor_name

    facts = {
        'lmdeploy': __version__,
        'python': sys.version.replace('\n', ' '),
        'platform': platform.platform(),
        'processor': processor_name(),
        'memory': _memory(),
    }
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = 'not installed'
    if not facts['triton'].startswith((PROVEN_TRITON, 'not')):
        facts['triton'] += f' (the GPU kernels are proven on {PROVEN_TRITON})'
    return facts | _torch_facts()


def _torch_facts() -> dict[str, str]:
    import torch

    facts = {
        'torch threads': str(torch.get_num_threads()),
        'torch cpu capability': torch.backends.cpu.get_cpu_capability(),
        'torch cuda': torch.version.cuda or 'none (CPU build)',
        'cuda available': str(torch.cuda.is_available()),
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            facts[f'gpu {i}'] = f'{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, sm_{gpu.major}{gpu.minor}'
    return facts


def _memory() -> str:
    try:
        fields = dict(line.split(':', 1) for line in Path('/proc/meminfo').read_text(encoding='utf-8').splitlines())
        total, free = (int(fields[name].split()[0]) / 2**20 for name in ('MemTotal', 'MemAvailable'))
    except (OSError, KeyError, ValueError):
        return 'unknown'
    return f'{total:.1f} GiB, {free:.1f} GiB available'


def dump(facts: dict[str, str], path: Path) -> None:
    """Write the facts as JSON, or as YAML, of which JSON strings are a part."""
    if path.suffix in ('.yml', '.yaml'):
        text = ''.join(f'{json.dumps(name)}: {json.dumps(value)}\n' for name, value in facts.items())
    else:
        text = json.dumps(facts, indent=2) + '\n'
    try:
        path.write_text(text, encoding='utf-8')
    except OSError as error:
        raise UsageError('LMD-408', path=path, reason=error.strerror or error) from None
