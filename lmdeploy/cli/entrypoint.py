"""The ``lmdeploy`` command: a table of commands that are imported only when asked for, and one way to fail.

``lmdeploy -h`` imports neither torch nor any command. Exit codes are those of sysexits.h where one fits:

====  ====================================================================
0     done
1     the request failed
2     wrong usage
65    a model file or a chat template is not usable
66    a model was not found or could not be fetched
70    the engine, or lmdeploy itself, failed
78    an option, or the model's configuration, cannot be honoured
98    the server's address is in use, or not to be had
130   interrupted
141   the reader of the output went away
====  ====================================================================
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

from lmdeploy.cli.args import UsageError
from lmdeploy.cli.screen import LANGUAGES, Screen, choose_language
from lmdeploy.errors import (
    BindError,
    ConfigError,
    EngineDead,
    LmdeployError,
    LoadError,
    RequestError,
    SourceError,
    TemplateError,
)
from lmdeploy.version import __version__

EXIT_CODES: dict[type[LmdeployError], int] = {
    RequestError: 1,
    UsageError: 2,
    LoadError: 65,
    TemplateError: 65,
    SourceError: 66,
    EngineDead: 70,
    BindError: 98,  # before its base class
    ConfigError: 78,
}
EXIT_BUG, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 70, 130, 141


@dataclass(frozen=True, slots=True)
class Command:
    """One entry of the table; ``module`` has ``add_arguments(parser)`` and ``run(args, screen) -> exit code``."""

    module: str
    help: str

    def load(self) -> ModuleType:
        return import_module(self.module)


COMMANDS = {
    'chat': Command('lmdeploy.cli.chat', 'talk to a model in the terminal'),
    'serve': Command('lmdeploy.cli.serve', 'serve a model over HTTP'),
    'lite': Command('lmdeploy.cli.lite', 'quantise a model'),
    'bench': Command('lmdeploy.cli.bench', 'measure the engine, a server, or the kernels'),
    'list': Command('lmdeploy.cli.list', 'list the models that have a short name, or the chat templates'),
    'pull': Command('lmdeploy.cli.pull', 'download a model'),
    'rm': Command('lmdeploy.cli.rm', 'delete a downloaded model'),
    'check_env': Command('lmdeploy.cli.check_env', 'print what a bug report should say of this machine'),
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for ``argv``: every command has its line of help, and only those in ``argv`` their arguments."""
    parser = argparse.ArgumentParser(
        prog='lmdeploy', description='Compress, deploy and serve large language models.',
        epilog='Start here: lmdeploy chat -q "Give three suggestions about time management."', allow_abbrev=False)
    parser.add_argument('-v', '--version', action='version', version=__version__)
    add_common(parser, suppress=False)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', title='commands')
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=f'{command.help.capitalize()}.',
                                  allow_abbrev=False)
        if name in argv:
            command.load().add_arguments(sub)
            add_common(sub, suppress=True)  # an option given before the command keeps its value
    return parser


def add_common(parser: argparse.ArgumentParser, suppress: bool) -> None:
    """The options that every command has."""
    group = parser.add_argument_group('messages')
    group.add_argument('--lang', choices=LANGUAGES, default=argparse.SUPPRESS if suppress else None,
                       help='language of messages (default: LMDEPLOY_LANG, else the locale)')
    group.add_argument('--debug', action='store_true', default=argparse.SUPPRESS if suppress else False,
                       help='show the traceback of an error')


def add_table(parser: argparse.ArgumentParser, table: Mapping[str, Command], what: str, whats: str) -> None:
    """Commands below a command: each a ``what``, whose name ``args`` has under ``what``."""
    commands = parser.add_subparsers(dest=what, metavar=what.upper(), title=whats, required=True)
    for name, command in table.items():
        sub = commands.add_parser(name, help=command.help, description=f'{command.help.capitalize()}.',
                                  allow_abbrev=False)
        command.load().add_arguments(sub)
        add_common(sub, suppress=True)


def main(argv: Sequence[str] | None = None, report: Callable[[LmdeployError], None] | None = None) -> int:
    """Run one command line and return its exit code; every error ends on one screen, or where ``report`` takes it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(argv)
    if not argv:
        parser.print_help()
        return 0
    args, unknown = parser.parse_known_args(argv)
    if args.command is None:
        parser.error('a command is missing')
    if unknown:
        parser.error(f'unrecognized arguments: {" ".join(unknown)} (see lmdeploy {args.command} -h)')
    screen = Screen(choose_language(args.lang))
    try:
        code = COMMANDS[args.command].load().run(args, screen)
        sys.stdout.flush()  # a reader that went away is noticed here, not at exit
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit finds a place to write
        return EXIT_BROKEN_PIPE
    except Exception as error:  # the outermost frame: whatever it is becomes one screen and an exit code
        if args.debug:
            traceback.print_exc()
        tell = report or replace(screen, as_json=getattr(args, 'log_format', None) == 'json').error
        if isinstance(error, LmdeployError):
            tell(error)
            return exit_code(error)
        tell(LmdeployError('LMD-401', kind=type(error).__name__, message=error))
        return EXIT_BUG


def exit_code(error: LmdeployError) -> int:
    """The documented exit code of an error's class."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
