"""``lmdeploy lite``: a table of methods, which are modules with ``add_arguments`` and ``run`` as commands are."""

from __future__ import annotations

import argparse

from lmdeploy.cli.entrypoint import Command, add_table
from lmdeploy.cli.screen import Screen

METHODS = {
    'auto_awq': Command('lmdeploy.cli.lite_auto_awq', 'weights in 4 bits, by AWQ'),
    'auto_gptq': Command('lmdeploy.cli.lite_auto_gptq', 'weights in 2, 3, 4 or 8 bits, by GPTQ'),
    'smooth_quant': Command('lmdeploy.cli.lite_smooth_quant', 'weights and inputs in 8 bits, int8 or float8'),
    'w4a8': Command('lmdeploy.cli.lite_packed', 'weights in 4 bits, inputs in 8'),
    'w3': Command('lmdeploy.cli.lite_packed', 'weights in 3 bits'),
    'w2': Command('lmdeploy.cli.lite_packed', 'weights in 2 bits, for large models'),
    'auto': Command('lmdeploy.cli.lite_auto', 'a mixture of 2, 3, 4 and 8 bits under a limit of size'),
    'compare': Command('lmdeploy.cli.lite_compare', 'one model in every form, measured on this machine'),
    'calibrate': Command('lmdeploy.cli.lite_calibrate', 'only look: statistics of all inputs of linear layers'),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_table(parser, METHODS, 'method', 'methods')


def run(args: argparse.Namespace, screen: Screen) -> int:
    return METHODS[args.method].load().run(args, screen)
