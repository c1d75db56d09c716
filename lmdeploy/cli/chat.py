"""``lmdeploy chat``: talk to a model in the terminal, ask one question, or answer the lines of a pipe.

====================  ==========================================================================
``-q QUESTION``       one answer on stdout; ``-q -`` reads the question from standard input
a terminal            a conversation with line editing
a pipe                every line is a turn of one conversation; lines may be commands
====================  ==========================================================================
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from lmdeploy.cli.args import (
    UsageError,
    add_engine_arguments,
    add_generation_arguments,
    engine_config,
    generation_config,
    template_config,
)
from lmdeploy.cli.reader import PipeReader, Reader, decode
from lmdeploy.cli.screen import Screen
from lmdeploy.config import env
from lmdeploy.messages import GenerationConfig

if TYPE_CHECKING:
    from lmdeploy.cli.settings import Settings
    from lmdeploy.pipe import Pipeline

# the penalty keeps small models from repeating one word to the end
DEFAULTS = GenerationConfig(do_sample=True, max_new_tokens=1024, temperature=0.4, top_p=0.9, top_k=40,
                            repetition_penalty=1.1)
ANY_VOCABULARY = 1 << 31


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', nargs='?', metavar='MODEL',
                        help='a folder, a .gguf file, a short name (see lmdeploy list) or a hub id; '
                             'default: asks on a terminal, else smollm2:135m')
    parser.add_argument('-q', '--question', default=None, metavar='TEXT',
                        help='answer this and leave; - reads it from standard input')
    parser.add_argument('--image', action='append', default=[], metavar='FILE',
                        help='a picture that the first question is about: a file or a URL; may be given again')
    parser.add_argument('--verbose', action='store_true', help='print the speed after each answer')
    parser.add_argument('--log-level', default=None, metavar='LEVEL', help='ERROR, WARNING, INFO or DEBUG')
    add_generation_arguments(parser, DEFAULTS)
    add_engine_arguments(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr]  # one letter missing, not all
    config, template = engine_config(args), template_config(args)
    settings = _settings(args)
    question, reader = source(args.question)
    terminal = reader is None and question is None
    images = _images(args.image)
    alias = _model(args.model, terminal, screen)
    pipe, seconds = _load(alias, args, config, template, screen)
    with pipe:
        return _talk(pipe, settings, args.system, screen, question, reader, seconds, images)


def source(question: str | None) -> tuple[str | None, Reader | None]:
    """The first question and where more come from; neither: a terminal, which is opened when the model is ready.

    Raises:
        UsageError: nothing was asked (LMD-404), or not in UTF-8 (LMD-405).
    """
    if question is not None and question != '-':
        text = decode(question.encode('utf-8', 'surrogateescape'), 'question')
        if not text.strip():
            raise UsageError('LMD-404')
        return text, None
    stream = sys.stdin
    if question is None and stream is not None and stream.isatty() and sys.stdout.isatty():
        return None, None
    if stream is None:
        raise UsageError('LMD-404')
    if question == '-':
        text = decode(stream.buffer.read(), 'standard input')
        if not text.strip():
            raise UsageError('LMD-404')
        return text, None
    reader = PipeReader(stream.buffer)
    first = reader.read()  # before the model loads: an empty pipe fails at once
    if first is None:
        raise UsageError('LMD-404')
    return first, reader


def _images(sources: list[str]) -> list[Any]:
    """The pictures, loaded before the model is.

    Raises:
        RequestError: LMD-665 and following.
    """
    if not sources:
        return []
    from lmdeploy.vl import load_image

    return [load_image(source) for source in sources]


def _model(named: str | None, terminal: bool, screen: Screen) -> str:
    """The model to load, with a word about its size and licence if it is one of the catalog."""
    from lmdeploy.cli import ladder
    from lmdeploy.hub import catalog

    alias = named
    if alias is None:
        alias = ladder.ask(screen) if terminal else catalog.DEFAULT
        if not terminal:
            screen.note('default_model', alias=alias)
    ladder.announce(alias, screen)
    return alias


def _load(model: str, args: argparse.Namespace, config, template, screen: Screen) -> tuple[Pipeline, float]:
    from lmdeploy import pipeline
    from lmdeploy.api import start_line

    if sys.stderr.isatty():
        screen.note('loading', model=model)
    start = time.perf_counter()
    pipe = pipeline(model, config, template, log_level=args.log_level or env.log_level() or 'WARNING')
    if args.verbose:
        print(start_line(pipe.frontend.capacity), file=sys.stderr)
    return pipe, time.perf_counter() - start


def _settings(args: argparse.Namespace) -> Settings:
    """How answers are generated, checked before the model loads as far as that goes without its vocabulary."""
    from lmdeploy.cli.settings import Settings

    return Settings(generation_config(args), args.verbose).change([], ANY_VOCABULARY)


def _talk(pipe: Pipeline, settings: Settings, system: str | None, screen: Screen, question: str | None,
          reader: Reader | None, seconds: float, images: list[Any]) -> int:
    from lmdeploy.cli.conversation import Conversation
    from lmdeploy.cli.repl import converse

    settings = settings.change([], pipe.frontend.capacity.vocab_size)
    conversation = Conversation(pipe.frontend, settings.gen, system, images=images)
    return converse(conversation, settings, screen, question, reader,
                    lambda: screen.note('ready', seconds=seconds, session_len=pipe.session_len))
