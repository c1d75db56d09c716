#!/usr/bin/env python3
"""Check the laws of the layout: who may import whom, what nobody may call, how long a file may be.

    python tools/check_layout.py [ROOT]

Prints one line per finding, ``path:line: what is wrong (the rule)``, and exits with 1 if there is an error. The laws
and their reasons are in docs/architecture.md, section 3. The standard library is all it needs.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WARN_LINES, MAX_LINES = 500, 700

# What a package of lmdeploy may import of lmdeploy. 'a.b' is that module only; FREE may be imported by all.
FREE = {'errors', 'log', 'version', 'texts', 'messages', 'config', 'child'}
DEVICE = {'ops', 'parallel', 'quant', 'weights', 'kv', 'attention', 'nn', 'runner.batch'}
MAY_IMPORT: dict[str, set[str]] = {
    'errors': {'texts'},
    'log': set(),
    'child': set(),
    'version': set(),
    'texts': set(),
    'messages': {'errors', 'log'},
    'config': {'messages', 'errors', 'log'},
    'hub': set(),
    'weights': set(),
    'tokenizer': {'weights'},
    'chat': {'tokenizer'},
    'grammar': {'tokenizer'},  # text in, masks out; no part of the engine, which asks for masks only
    'model': {'chat'},
    'vl': set(),
    'ops': {'kv'},
    'parallel': set(),
    'kv': set(),
    'quant': {'ops', 'parallel', 'weights'},
    'attention': {'ops', 'kv', 'runner.batch'},
    'nn': DEVICE - {'nn'},
    'models': DEVICE,
    'runner': DEVICE | {'models', 'runner', 'engine.plan', 'engine.sampling', 'vl.mrope'},
    'executor': DEVICE | {'models', 'runner', 'engine.plan', 'engine.sampling'},
    'engine': {'executor.base'},
    'frontend': {'engine', 'executor.base', 'chat', 'grammar', 'tokenizer', 'vl'},
    'bench': DEVICE | {'engine', 'executor', 'models', 'runner', 'serve.fetch', 'serve.listener'},
    'pipe': {'frontend'},
    'serve': {'frontend', 'engine', 'executor.base', 'chat', 'grammar', 'tokenizer', 'vl', 'hub'},
    'lite': {'models', 'quant', 'weights', 'tokenizer', 'chat', 'vl', 'hub', 'nn', 'parallel', 'ops', 'runner'},
}
ROOTS = {'__init__', '__main__', 'api', 'cli', 'extend'}  # compose everything; nothing below may import them
PROCESS_ROOTS = {('engine', 'process.py')}  # a program of its own that composes an engine
TORCHLESS = {'engine', 'chat', 'config', 'frontend', 'grammar', 'hub', 'tokenizer', 'serve', 'cli', 'api', 'pipe',
             'model', 'messages', 'errors', 'log', 'texts', 'version', 'vl', '__init__', '__main__'}
# not at module level there
HEAVY = {'torch', 'triton', 'rich', 'prompt_toolkit', 'huggingface_hub', 'sentencepiece', 'llguidance'}
DEVICE_NAMES = {'ops', 'parallel', 'runner', 'config', 'cli', 'messages'}  # may write the literal 'cuda'
NEVER_IMPORT = {'pickle', 'marshal', 'shelve', 'dill', 'cloudpickle', 'joblib', 'transformers'}
NEVER_CALL = {'eval', 'exec', '__import__', 'breakpoint', 'torch.load', 'os.system'}
LEFTOVER = re.compile(r'\b(TODO|FIXME|XXX|HACK|WIP)\b')


@dataclass(frozen=True, slots=True)
class Finding:
    path: Path
    line: int
    text: str
    error: bool = True

    def __str__(self) -> str:
        return f'{self.path}:{self.line}: {"" if self.error else "warning: "}{self.text}'


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module (``from a.b import c`` is ``a.b.c`` too) and whether it happens when the file is imported."""

    name: str
    line: int
    eager: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """All imports of a file; those below a function or ``if TYPE_CHECKING`` are not eager."""
    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    yield Import('.' * child.level, child.lineno, eager)
                else:
                    yield from (Import(f'{child.module}.{alias.name}', child.lineno, eager) for alias in child.names)
            else:
                lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                typing_only = isinstance(child, ast.If) and 'TYPE_CHECKING' in ast.unparse(child.test)
                yield from walk(child, eager and not lazy and not typing_only)

    return walk(tree, True)


def check_imports(tree: ast.Module, path: Path, package: str) -> Iterator[Finding]:
    triton_home = path.parts[1:3] == ('ops', 'triton')
    for item in imports(tree):
        top, _, rest = item.name.partition('.')
        if not top:
            yield Finding(path, item.line, 'relative import: write the full name')
        if top in NEVER_IMPORT:
            yield Finding(path, item.line, f'imports {top}, which nothing here may (unsafe or too heavy)')
        if top in HEAVY and item.eager and package in TORCHLESS:
            yield Finding(path, item.line, f'imports {top} at module level, but {package} must load without it')
        if top == 'triton' and not triton_home:
            yield Finding(path, item.line, 'imports triton outside ops/triton')
        if (top == 'ray' or item.name.startswith('torch.distributed')) and package not in ('executor', 'parallel'):
            yield Finding(path, item.line, f'imports {top}.distributed or ray outside executor and parallel')
        if top == 'lmdeploy' and rest and package not in ROOTS and path.parts[1:] not in PROCESS_ROOTS:
            yield from _check_direction(item, rest, path, package)


def _check_direction(item: Import, target: str, path: Path, package: str) -> Iterator[Finding]:
    if package not in MAY_IMPORT:
        yield Finding(path, item.line, f'package {package} has no place in the table of tools/check_layout.py')
        return
    allowed = MAY_IMPORT[package] | {package, '__version__', 'version_info'} | (set() if package in FREE else FREE)
    if not any(target == name or target.startswith(f'{name}.') for name in allowed):
        yield Finding(path, item.line, f'{package} may not import lmdeploy.{target}: imports point down only')


def check_calls(tree: ast.Module, path: Path, package: str) -> Iterator[Finding]:
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            truths = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
            if name in NEVER_CALL or 'allow_pickle' in truths or 'shell' in truths:
                yield Finding(path, node.lineno, f'calls {name}(...), which can run code from data')
        elif isinstance(node, ast.Attribute) and path.parts[1:] != ('config', 'env.py'):
            if ast.unparse(node) in ('os.environ', 'os.getenv', 'os.environb'):
                yield Finding(path, node.lineno, f'{ast.unparse(node)}: only config/env.py reads the environment')
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and package not in DEVICE_NAMES:
            if id(node) not in docstrings and (node.value == 'cuda' or node.value.startswith('cuda:')):
                yield Finding(path, node.lineno, f'the literal {node.value!r} belongs in '
                                                  f'{", ".join(sorted(DEVICE_NAMES))}')


def check_text(source: Path, path: Path) -> Iterator[Finding]:
    with source.open('rb') as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT and LEFTOVER.search(token.string):
                yield Finding(path, token.start[0], f'leftover: {token.string.strip()}')
    lines = source.read_bytes().count(b'\n')
    if lines > WARN_LINES:
        yield Finding(path, lines, f'{lines} lines; a file is one idea, of at most {WARN_LINES} lines (never more than '
                                   f'{MAX_LINES})', error=lines > MAX_LINES)


def check(root: Path) -> list[Finding]:
    """All findings below ``root``: every law for ``lmdeploy/``, the texts' for all other Python files."""
    found: list[Finding] = []
    for folder in ('lmdeploy', 'tests', 'tools', 'examples', 'benchmark'):
        for source in sorted((root / folder).rglob('*.py')):
            path = source.relative_to(root)
            found += check_text(source, path)
            if folder == 'lmdeploy':
                tree = ast.parse(source.read_text(encoding='utf-8'), str(path))
                package = path.parts[1].removesuffix('.py')
                found += check_imports(tree, path, package)
                found += check_calls(tree, path, package)
    return found


def main(argv: list[str]) -> int:
    root = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent
    if not (root / 'lmdeploy').is_dir():
        print(f'{root} has no folder lmdeploy', file=sys.stderr)
        return 2
    found = check(root)
    errors = sum(finding.error for finding in found)
    print('\n'.join(map(str, found)), end='\n' if found else '')
    print(f'layout: {errors} errors, {len(found) - errors} warnings')
    return 1 if errors else 0


if __name__ == '__main__':
    raise SystemExit(main(sys.argv[1:]))
