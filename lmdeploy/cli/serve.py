"""``lmdeploy serve``: a table of servers, which are modules with ``add_arguments`` and ``run`` as commands are."""

from __future__ import annotations

import argparse

from lmdeploy.cli.entrypoint import Command, add_table
from lmdeploy.cli.screen import Screen

SERVICES = {
    'api_server': Command('lmdeploy.cli.api_server', 'answer requests in the form of OpenAI and LMDeploy'),
    'proxy': Command('lmdeploy.cli.proxy', 'one address for many servers'),
    'api_client': Command('lmdeploy.cli.api_client', 'talk to a running server in the terminal'),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_table(parser, SERVICES, 'service', 'services')


def run(args: argparse.Namespace, screen: Screen) -> int:
    return SERVICES[args.service].load().run(args, screen)
