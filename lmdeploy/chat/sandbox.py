"""A jinja environment for templates that come with models: they read their input, and nothing else.

Three fences:

1. Attributes are allowed by a short list per type, not forbidden by one; names that begin with two underscores are
   refused when the template is compiled; ``include``, ``import`` and ``extends`` do not exist.
2. Only filters and globals that chat templates use are there (:mod:`lmdeploy.chat.filters`).
3. Every loop turn, call, filter, literal, concatenation, slice and multiplication spends from a
   :class:`~lmdeploy.chat.budget.Budget`, before the text is made where the size can be told beforehand. Nothing is
   computed at compile time, where no budget runs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator
from functools import update_wrapper
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.filters import _GroupTuple
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from lmdeploy.chat.budget import ENTRY_CHARS, Budget, current
from lmdeploy.chat.filters import MAX_BITS, MAX_WIDTH, SafeNamespace, before_replace, filters, global_names

TEXT = frozenset('capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal '
                 'isdigit islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix '
                 'removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip '
                 'swapcase title upper'.split())
SEQUENCE = frozenset(('index', 'count'))
ATTRIBUTES: dict[type, frozenset[str]] = {
    str: TEXT,
    Markup: TEXT,
    list: SEQUENCE,
    tuple: SEQUENCE,
    _GroupTuple: frozenset(('grouper', 'list')),
    dict: frozenset(('get', 'items', 'keys', 'values', 'copy')),
    LoopContext: frozenset('index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle '
                           'changed'.split()),
    Macro: frozenset(('name', 'arguments', 'caller')),
}


class _Code(CodeGenerator):
    """Compiles templates so that whatever can grow passes through the environment's budget."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = nodes.Call(nodes.EnvironmentAttribute('counted'), [node.iter], [], None, None)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write('environment.concat((')
        for part in node.nodes:
            self.visit(part, frame)
            self.write(', ')
        self.write('))')

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write('environment.spend_on(')
        super().visit_List(node, frame)
        self.write(')')

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write('environment.spend_on(')
        super().visit_Dict(node, frame)
        self.write(')')

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != 'load':  # the targets of an assignment
            super().visit_Tuple(node, frame)
            return
        self.write('environment.spend_on(')
        super().visit_Tuple(node, frame)
        self.write(')')

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write('environment.spend_on(')
        super().visit_Getitem(node, frame)
        self.write(')')

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible  # an expression may be a bomb: it is evaluated under a budget only
        return super()._output_child_to_const(node, frame, finalize)


class _Generation(Extension):
    """``{% generation %}`` marks what the model writes; for rendering it is a scope of its own and nothing else."""

    tags = {'generation'}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled and rendered in."""

    code_generator_class = _Code
    intercepted_binops = frozenset(('+', '*', '**', '%'))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls],
                         optimized=False, cache_size=0)
        self.globals = global_names()
        self.filters = filters()

    def compile_checked(self, source: str) -> Any:
        """Compile a template, and walk its tree first: what is not allowed at all is refused with its line.

        Raises:
            jinja2.TemplateSyntaxError, SecurityError (with ``.lineno``), RecursionError, SyntaxError, MemoryError.
        """
        for node in _walk(self.parse(source)):
            reason = _forbidden(node)
            if reason:
                error = SecurityError(reason)
                error.lineno = node.lineno  # type: ignore[attr-defined]
                raise error
        return self.from_string(source)

    # Fence 1: attributes.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, SafeNamespace):
            return not attr.startswith('_')
        return attr in ATTRIBUTES.get(type(obj), ())

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f'{attribute!r} of a {type(obj).__name__} is not accessible')

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def guarded(*args: Any, **kwargs: Any) -> Any:
            _check_format(text)
            budget = current()
            budget.spend(len(text) + text.count('{') * (budget.tree(args) + budget.tree(kwargs)))
            return wrapped(*args, **kwargs)

        return update_wrapper(guarded, value)

    # Fence 3: everything that loops or makes something.

    def counted(self, iterable: Iterable[Any]) -> Iterable[Any]:
        """``iterable``, spending budget at every turn; sized if it was, because ``loop.length`` asks."""
        return _Sized(iterable) if hasattr(type(iterable), '__len__') else current().count(iterable)

    def concat(self, parts: Iterable[Any]) -> str:
        """The joined texts: of ``~``, and of the pieces of macros and blocks."""
        texts = [part if type(part) is str else str(part) for part in parts]
        current().spend(sum(map(len, texts)))
        return ''.join(texts)

    def spend_on(self, value: Any) -> Any:
        return current().spend_on(value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (named as jinja2's)
        budget = current()
        budget.spend(ENTRY_CHARS)
        if isinstance(__obj, (BuiltinMethodType, MethodType)) and isinstance(__obj.__self__, str):
            args = _before_text_method(budget, __obj.__self__, __obj.__name__, args)
        elif isinstance(__obj, Macro):  # keeps its arguments as lists of its own
            budget.tree(args)
            budget.tree(kwargs)
        return budget.spend_on(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _before_operation(current(), operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (list, tuple)):
            current().joined(result, (left, right) if operator == '+' else (result,))
        return result


class _Sized:
    __slots__ = ('iterable',)

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return current().count(self.iterable)

    def __len__(self) -> int:
        return len(self.iterable)


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(node.iter_child_nodes())


def _forbidden(node: nodes.Node) -> str | None:
    """Why a node may not be in a template; None if it may."""
    name: Any = None
    if isinstance(node, (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        return f'{type(node).__name__.lower()} is not available'
    if isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value.bit_length() > MAX_BITS:
        return f'integers have at most {MAX_BITS} bits'
    if isinstance(node, (nodes.Getattr, nodes.NSRef)):
        name = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        name = node.arg.value
    elif isinstance(node, nodes.Name):
        name = node.name
    return f'{name!r} is not accessible' if isinstance(name, str) and name.startswith('__') else None


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return ENTRY_CHARS * len(value) if isinstance(value, (list, tuple, dict)) else ENTRY_CHARS


def _before_operation(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Count the result of an operation before it is made, and refuse what would take too long to compute."""
    budget.spend()
    integers = isinstance(left, int) and isinstance(right, int)
    if operator == '+':
        if not integers:
            budget.spend(_size(left) + _size(right))
    elif operator == '*':
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
                budget.spend(max(0, times) * _size(sequence))
        if integers and left.bit_length() + right.bit_length() > MAX_BITS:
            raise SecurityError(f'integers have at most {MAX_BITS} bits')
    elif operator == '**':
        if integers and left.bit_length() * max(0, right) > MAX_BITS:
            raise SecurityError(f'integers have at most {MAX_BITS} bits')
    elif isinstance(left, str):
        if re.search(r'%(\([^)]*\))?[^a-zA-Z%]*(\*|\d{4,})', left):
            raise SecurityError(f'formats are at most {MAX_WIDTH} wide')
        budget.spend(len(left) + left.count('%') * budget.tree(right))


def _check_format(text: str) -> None:
    for _, _, spec, _ in string.Formatter().parse(text):
        if spec and ('{' in spec or re.search(r'\d{4,}', spec)):
            raise SecurityError(f'formats are at most {MAX_WIDTH} wide')


def _before_text_method(budget: Budget, text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Count the result of a text method before it is made, where it may be larger than what goes in."""
    if method == 'replace' and len(args) >= 2:
        before_replace(budget, text, args[0], args[1])
    elif method == 'join' and args:
        items = list(budget.count(args[0]))
        budget.spend(sum(map(_size, items)) + len(text) * len(items))
        return (items, *args[1:])
    else:
        budget.spend(len(text))  # the method reads all of it
    return args
