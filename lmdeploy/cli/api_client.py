"""``lmdeploy serve api_client URL``: what ``lmdeploy chat`` is for a model, for a running server."""

from __future__ import annotations

import argparse
import sys

from lmdeploy.cli.args import add_generation_arguments, generation_config
from lmdeploy.cli.chat import DEFAULTS, source
from lmdeploy.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('api_server_url', metavar='URL', help='of the server, as http://HOST:PORT')
    parser.add_argument('--api-key', default=None, metavar='KEY', help='one of the keys of the server, if it has any')
    parser.add_argument('--session-id', type=_session_id, default=1, metavar='N',
                        help='under which the server remembers the conversation (default: %(default)s)')
    parser.add_argument('-q', '--question', default=None, metavar='TEXT',
                        help='answer this and leave; - reads it from standard input')
    parser.add_argument('--verbose', action='store_true', help='print the speed after each answer')
    add_generation_arguments(parser, DEFAULTS)


def _session_id(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError('give a number from 0')
    return int(text)


def run(args: argparse.Namespace, screen: Screen) -> int:
    from lmdeploy.cli.remote import FIELDS, RemoteConversation
    from lmdeploy.cli.repl import converse
    from lmdeploy.cli.settings import Settings
    from lmdeploy.serve.openai.api_client import APIClient

    sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr]  # one letter missing, not all
    client = APIClient(args.api_server_url, args.api_key)
    question, reader = source(args.question)
    model = client.models()[0]
    conversation = RemoteConversation(client, args.session_id, generation_config(args), args.system)
    settings = Settings(conversation.gen, args.verbose, tuple(FIELDS)).change([], conversation.vocab_size)
    return converse(conversation, settings, screen, question, reader,
                    lambda: screen.note('remote_ready', model=model, url=args.api_server_url))
